"""Where a value comes from: `python -m ftcore explain key=method.beta method=dpo`.

The config is composed and checked as for a run. Hydra says of which files and in which order; these are read once more, with
their lines and comments, and every place that sets a key is kept, so that replaced values can be shown too.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from rich.table import Table
from rich.text import Text

from ftcore.config.check import closest, describe
from ftcore.config.compose import load_config, read_overrides
from ftcore.config.given import quoted
from ftcore.config.options import folders, options
from ftcore.config.recipe_rules import staged_recipes
from ftcore.config.roles import type_of
from ftcore.config.yaml_source import choices, read
from ftcore.console import plain, wide_console
from ftcore.errors import ConfigError
from ftcore.files import resources
from ftcore.run_folder import Row, Run
from ftcore.settings import FILES, GROUPS, Config, ExplainArguments


@dataclass(frozen=True)
class Setting:
    """One place that sets a key; `comment` is what stands above it: in conf/ what the key means, elsewhere why it is set."""

    path: str
    value: object
    source: str
    comment: str = ""
    in_conf: bool = False


def explain(arguments: ExplainArguments, words: list[str], config_dirs: tuple[Path, ...] = ()) -> list[Row]:
    """Print value, source, replaced values, type and meaning of every key that `key=` names."""
    config = load_config(words, config_dirs)
    known = dict(_nodes(config))
    history = [*_of_files(config, words, config_dirs), *_of_run(config, words), *_of_command_line(words)]
    answers: list[Row] = []
    for key in _named(arguments["key"] or [], known):
        if answers:
            plain.print()
        settings = _settings_of(key, known[key], history)
        answers.append(_answer(key, config, known[key], settings))
        if isinstance(known[key], Mapping) and known[key]:
            _print_table(key, known, history)
        else:
            _print_key(answers[-1], settings)
    return answers


def _named(asked: str | list[str], known: Mapping[str, object]) -> list[str]:
    """The keys that `key=` names, each once."""
    keys = list(dict.fromkeys(re.findall(r"[^\s,\[\]]+", asked if isinstance(asked, str) else " ".join(asked))))
    if not keys:
        raise ConfigError(
            "Which key? Write key=method.lr, key=[method.lr,seed] or a whole group, key=method, and after it the words of "
            "the run: python -m ftcore explain key=method.lr method=dpo."
        )
    for key in [key for key in keys if key not in known]:
        same = [path for path in known if path.rpartition(".")[2] == key.rpartition(".")[2]]
        meant = f"; did you mean {same[0]!r}?" if same else closest(key, known)
        raise ConfigError(f"key={key}: this config has no such key{meant}")
    return keys


def _answer(key: str, config: Config, value: object, settings: list[Setting]) -> Row:
    """What a program wants to know of a key; `settings` are the places that set it, the newest first."""
    known_type = type_of(key, config)
    kind = describe(known_type) if known_type else "anything"
    if key.endswith("._target_"):
        kind = "text: the class or function that gets the other keys"
    replaced = [{"value": setting.value, "set_by": setting.source} for setting in settings[1:]]
    about = {"replaced": replaced, "type": kind, "meaning": _meaning(key, settings)}
    return {"key": key, "value": value, "set_by": settings[0].source, **about}


def _nodes(node: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) of every mapping and every value below `node`."""
    for key, value in node.items():
        inner = f"{path}.{key}".strip(".")
        yield inner, value
        if isinstance(value, Mapping):
            yield from _nodes(value, inner)


def _of_files(config: Config, words: list[str], config_dirs: tuple[Path, ...]) -> Iterator[Setting]:
    """What the files of conf/, recipes/ and sweeps/ set, the ones that replace others last."""
    named = [(o.key_or_group, str(o.value())) for o in read_overrides(words) if o.key_or_group in FILES and o.value()]
    chosen = {group: option for group, option in config["choices"].items() if group not in FILES} | dict(named)
    # With run=, an option of then may be gone.
    lines = [f"{group}={option}" for group, option in chosen.items() if option in options(group, config_dirs)]
    with staged_recipes(named, config_dirs) as staged:
        if search := [*staged.search_path, *config_dirs]:
            lines.append(f"hydra.searchpath=[{','.join(quoted(f'file://{folder}') for folder in search)}]")
        with initialize_config_dir(str(resources() / "conf"), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            parts = loader.compute_defaults_list("config", lines, RunMode.RUN).defaults
    for part in parts:
        group, _, option = str(part.config_path).partition("/")
        places = folders(group, config_dirs) if option else [resources() / "conf"]
        for file in [file for folder in places if (file := folder / f"{option or group}.yaml").is_file()][:1]:
            yield from _of_file(file, part.package or "", in_conf=group not in FILES)


def _of_file(file: Path, package: str = "", in_conf: bool = False) -> Iterator[Setting]:
    """Every key that a file sets, placed below `package`, and the options that it chooses."""
    shown = file.relative_to(resources()) if file.is_relative_to(resources()) else file
    source = read(file)
    if package:
        yield Setting(package, {}, f"{shown}:1", source.comment, in_conf)
    for entry in source.entries:
        if not entry.in_list and entry.path != "defaults":
            path = f"{package}.{entry.path}".strip(".")
            yield Setting(path, entry.value, f"{shown}:{entry.line}", entry.comment, in_conf)
    for group, option, line in choices(source.entries):
        if group in GROUPS:
            yield Setting(f"choices.{group}", option, f"{shown}:{line}")


def _of_run(config: Config, words: list[str]) -> Iterator[Setting]:
    """With `run=` or `resume=`: what that run's config.yaml gives."""
    named = config["run"] or (config["resume"] if config["resume"] != "auto" else None)
    chosen = {o.key_or_group for o in read_overrides(words)} & {*GROUPS}
    chosen |= {f"choices.{group}" for group in chosen}
    for setting in _of_file(Run(named).config_file) if named else ():
        if not any(setting.path == path or setting.path.startswith(f"{path}.") for path in chosen):
            yield setting


def _of_command_line(words: list[str]) -> Iterator[Setting]:
    for override in read_overrides(words):
        name, value, source = override.key_or_group, override.value(), f"command line, {override.input_line}"
        yield Setting(f"choices.{name}" if name in GROUPS else name, value, source)
        for path, inner in _nodes(value, name) if isinstance(value, Mapping) else ():
            yield Setting(path, inner, source)


def _settings_of(key: str, value: object, history: list[Setting]) -> list[Setting]:
    """The places that set a key or, with something that is no mapping, all around it; newest first."""
    found = []
    for setting in reversed(history):
        around = key.startswith(f"{setting.path}.") and not isinstance(setting.value, Mapping)
        found += [setting] if setting.path == key or around else []
    if key == "name" and value != found[0].value:
        found.insert(0, Setting(key, value, "ftcore, from the chosen method, data and model"))
    return found or [Setting(key, value, "ftcore")]


def _print_table(key: str, known: dict[str, object], history: list[Setting]) -> None:
    """All keys below a group or mapping, with value and source."""
    title = key
    if option := known.get(f"choices.{key}"):
        title = f"{key}={option}  ({_settings_of(f'choices.{key}', option, history)[0].source})"
    plain.print("\n    ".join([title, *_meaning(key, history[::-1]).splitlines()]))
    table = Table("key", "value", "set by")
    for path, value in known.items():
        if path.startswith(f"{key}.") and not (isinstance(value, Mapping) and value):
            source = _settings_of(path, value, history)[0].source
            table.add_row(*(Text(text, overflow="fold") for text in (path, _shown(value), source)))
    wide_console().print(table)


def _print_key(answer: Row, settings: list[Setting]) -> None:
    """One key: who set it, what was there before, what it may be and what it means."""
    newest, *before = settings
    written = f" (written {newest.value})" if "${" in str(newest.value) else ""
    plain.print(f"{answer['key']} = {_shown(answer['value'])}{written}")
    lines = {
        "set by": newest.source,
        "replaced": "\n".join(f"{_shown(setting.value)}, {setting.source}" for setting in before),
        "type": str(answer["type"]),
        "meaning": str(answer["meaning"]),
        "said there": "" if newest.in_conf else newest.comment,
    }
    for title, text in lines.items():
        for k, line in enumerate(text.splitlines()):
            plain.print(f"  {'' if k else title:<10} {line}")


def _meaning(key: str, newest_first: list[Setting]) -> str:
    """The comment of the nearest file of conf/ that has one."""
    return next((s.comment for s in newest_first if s.path == key and s.in_conf and s.comment), "")


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
