"""From a command line to a checked, plain config, without importing torch.

Hydra's Compose API composes conf/, which runs no code. Then config/check.py finds unknown, missing, mistyped and out-of-range
keys, and they are reported together.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftcore.config.build import schemas
from ftcore.config.check import Problem, closest, conflicts, node_problems, report, schema_problems
from ftcore.config.given import quoted
from ftcore.config.options import options
from ftcore.config.recipe_rules import GIVEN, Staged, staged_recipes
from ftcore.config.roles import keys_of, mappings
from ftcore.config.tree import above, flatten
from ftcore.config.yaml_source import read
from ftcore.errors import ConfigError
from ftcore.files import resources
from ftcore.run_folder import Run
from ftcore.settings import FILES, GROUPS, NAMED_AFTER, Config


def load_config(
    arguments: list[str],
    config_dirs: tuple[Path, ...] = (),
    recipe: Path | None = None,
    more: Callable[[Config], Iterable[Problem]] = lambda _: (),
) -> Config:
    """Compose and check the config of a command line.

    `arguments` are Hydra overrides (`method=dpo method.lr=1e-4`). With `run=<folder>` that run's config.yaml is the base
    that they change. `recipe` is a recipe file at any path; `more` finds further problems. Raises `ConfigError` naming every
    problem.
    """
    overrides = read_overrides([word for word in arguments if word not in ("recipes=null", "sweeps=null")])
    chosen = [o for o in overrides if o.key_or_group in GROUPS]
    values = [o for o in overrides if o.key_or_group not in GROUPS]
    options_chosen = {o.key_or_group: o.value() for o in chosen}
    if wrong := _wrong_options(options_chosen, config_dirs):
        raise ConfigError("\n".join(f"{group} {problem}" for group, problem in wrong.items()))
    with staged_recipes(_files(options_chosen, recipe), config_dirs) as staged:
        wrong = _wrong_options({**staged.chosen, **options_chosen}, config_dirs)
        instead = {group: options(group)[0] for group in wrong} | ({"recipes": GIVEN} if recipe else {})
        chosen += read_overrides(
            [f"{group}={option}" for group, option in instead.items()]
        )  # to see what else is wrong
        config = _on_top_of_run(compose(chosen, values, [*staged.search_path, *config_dirs]), chosen, values)
        config["name"] = config.get("name") or default_name(config)
        if config.get("trust") != next((o.value() for o in values if o.key_or_group == "trust"), []):
            raise ConfigError("trust is given on the command line only: no file may say whose code runs.")
        problems = _all_problems(config, values, staged, wrong, more)
    if problems:
        words = {o.key_or_group: f"command line, {o.input_line}" for o in values}
        raise ConfigError(report(problems, staged.lines | words))
    return config


def default_name(config: Config) -> str:
    """The name of a run that has none of its own: its method, data and model."""
    return "-".join(str(config["choices"][group]) for group in NAMED_AFTER)


def _files(chosen: Mapping[str, object], recipe: Path | None) -> list[tuple[str, str | Path]]:
    """(group, name or file) of every recipe and sweep."""
    if recipe and "recipes" in chosen:
        raise ConfigError("recipe= and recipes= are two recipes: give one of the two.")
    files = {group: chosen[group] for group in FILES if group in chosen} | ({"recipes": recipe} if recipe else {})
    return [(group, file if isinstance(file, Path) else str(file)) for group, file in files.items()]


def _wrong_options(choices: Mapping[str, object], config_dirs: Iterable[Path]) -> dict[str, str]:
    """Group -> what is wrong with the option chosen for it."""
    problems = {}
    for group, option in choices.items():
        known = options(group, config_dirs)
        if isinstance(option, list | dict):
            parts = set(map(str, option))
            joint = next((f"; did you mean {group}={name}?" for name in known if parts == set(name.split("_"))), ".")
            problems[group] = f"takes the name of one option{joint} Options: {', '.join(known)}."
        elif str(option) not in known:
            meant = closest(str(option), known)
            problems[group] = f"has no option {str(option)!r}{meant} Options: {', '.join(known)}."
    return problems


def _all_problems(
    config: Config,
    values: list[Override],
    staged: Staged,
    wrong_options: dict[str, str],
    more: Callable[[Config], Iterable[Problem]],
) -> list[Problem]:
    problems = list(schema_problems(config, config["trust"]))
    if mappings().isdisjoint({*wrong_options, *(path for path, _ in problems)}):
        problems += conflicts(config)
    set_by_words = {o.key_or_group for o in values}
    missing = {path for path, value in flatten(config, in_lists=True) if value == "???"}
    missing |= {key for key in staged.required if set_by_words.isdisjoint(above(key))}
    unknown = {*missing, *wrong_options}  # nothing more can be said of these and of keys below them
    problems = [p for p in (*problems, *more(config)) if unknown.isdisjoint(above(p[0]))]
    problems += [(path, f"is missing: give {path}=... on the command line") for path in sorted(missing)]
    return problems + [(f"defaults.override /{group}", text) for group, text in wrong_options.items()]


def read_overrides(arguments: list[str]) -> list[Override]:
    """Parse the overrides of a command line. Raises `ConfigError` for what is no override, and for a deletion or a sweep."""
    try:
        overrides = OverridesParser.create().parse_overrides(arguments)
    except (OverrideParseException, ValueError) as error:  # or a number of thousands of digits
        word = repr(getattr(error, "override", "with a very long number"))
        raise ConfigError(
            f"Cannot read the override {word}. Write key=value, such as method.lr=1e-4; quote what "
            f"holds commas, brackets or equals signs: 'logger.tags=[\"a, b\"]'."
        ) from None
    for override in overrides:
        if override.key_or_group.split(".")[0].split("/")[0] == "hydra":
            raise ConfigError(f"{override.input_line!r}: hydra.* keys cannot be set.")
        if override.is_delete() or override.is_sweep_override():
            kind = "deletion" if override.is_delete() else "sweep"
            advice = "Give one value per key; write lists as key=[a,b]."
            raise ConfigError(f"{override.input_line!r} is a {kind}, which this command does not take. {advice}")
    return overrides


def compose(chosen: list[Override], values: list[Override], search: list[Path]) -> Config:
    """Compose the chosen options, then the values on top; `choices` says which option each group got."""
    # With `++` Hydra accepts misspelt keys; the check then reports all of them at once, with suggestions.
    lines = [o.input_line or "" for o in chosen] + ["++" + (o.input_line or "").lstrip("+") for o in values]
    if search:
        lines.append(f"hydra.searchpath=[{','.join(quoted(f'file://{folder}') for folder in search)}]")
    try:
        with hydra.initialize_config_dir(str(resources() / "conf"), version_base="1.3"):
            config = hydra.compose("config", lines, return_hydra_config=True)
        plain = _plain(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
        plain["choices"] = {group: config.hydra.runtime.choices.get(group) for group in GROUPS}
        return plain
    except (HydraException, OmegaConfBaseException) as error:
        lines = str(error).strip().splitlines()
        keys = [line.strip().removeprefix("full_key: ") for line in lines if "full_key: " in line]
        where = f" (at {keys[0]})" if keys else ""
        raise ConfigError(f"The config does not compose: {lines[0].strip()}{where}.") from None


def _plain(config: object) -> Config:
    """A plain dict, with interpolations resolved; missing values stay `???`."""
    try:
        return cast(Config, OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    except RecursionError:
        raise ConfigError("An interpolation ${...} refers to itself; look for a cycle in your overrides.") from None


def _on_top_of_run(config: Config, chosen: list[Override], values: list[Override]) -> Config:
    """With `run=` or `resume=`: that run's config, with what the command line chooses and sets."""
    resumed = config.get("resume") if config.get("resume") != "auto" else None
    word, named = ("run", config["run"]) if config.get("run") else ("resume", resumed)
    if not named:
        return config
    run = Run(str(named))
    if not run.begun:
        raise ConfigError(f"{word}={named} is not a run folder: {run.config_file.resolve()} does not exist.")
    base = run.config
    if not isinstance(base, dict) or not isinstance(base.get("choices"), dict):
        raise ConfigError(f"{run.config_file} is not the config.yaml of a run of this version of ftcore.")
    if any(o.key_or_group == "recipes" for o in chosen):
        raise ConfigError(f"{word}= and recipes= are two configs: give one of the two.")
    kept = {*(o.key_or_group for o in chosen), *keys_of("command")}
    merged = OmegaConf.create({**config, **{key: value for key, value in base.items() if key not in kept}})
    merged["choices"] = base["choices"] | {o.key_or_group: config["choices"][o.key_or_group] for o in chosen}
    for override in values:
        OmegaConf.update(merged, override.key_or_group, override.value(), force_add=True)
    return _plain(merged)


def of_run(config: Config) -> dict[str, object]:
    """The config that a run keeps: without keys that belong to the command alone."""
    return {key: value for key, value in config.items() if key not in keys_of("command")}


def own_arguments(verb: str, words: list[str]) -> tuple[dict[str, object], list[str]]:
    """A verb's arguments (its node of conf/config.yaml with what `words` set in it), and the other words.

    Raises `ConfigError` for arguments that the verb does not have, and for values that they cannot have.
    """
    defaults = read(resources() / "conf" / "config.yaml").value(verb)
    own = [word for word in words if word.lstrip("+").startswith(f"{verb}.")] if defaults else []
    node = dict(defaults) if isinstance(defaults, dict) else {}
    node |= {o.key_or_group.partition(".")[2]: o.value() for o in read_overrides(own)}
    if problems := list(node_problems(node, schemas()["top"]["properties"].get(verb, {}), verb)):
        raise ConfigError(report(problems, {}))
    return node, [word for word in words if word not in own]
