"""`pack`: a recipe and a lock of a finished run, for others to `replay`.

The recipe holds what differs from the shipped conf/ and no place of the machine it comes from: own files are known by name and
hash, and who receives it gives theirs on the command line. What it depends on beside that is in the lock. A run that goes on from
earlier ones is packed with theirs, each in a folder of its own, and with the votes that they were trained on: see cycles.py.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import yaml

from ftcore.config.build import build, record_type
from ftcore.config.compose import default_name, load_config
from ftcore.config.given import quoted
from ftcore.config.options import options
from ftcore.config.recipe_rules import HEADER, TEXT
from ftcore.config.roles import role_of, values_of
from ftcore.config.tree import flatten, put
from ftcore.config.words import chosen_options, values_of_options
from ftcore.console import plain, typed
from ftcore.data.records import Data
from ftcore.errors import ConfigError, DataError, StorageError
from ftcore.files import expanded, whole_file
from ftcore.models.foundation import load_run
from ftcore.run_folder import Run, Summary
from ftcore.runs.folder import changes_of_result
from ftcore.runs.stages import folder_of, stage_config, stages_of
from ftcore.settings import NAMED_AFTER, Config
from ftcore.sharing.cycles import BEFORE, CYCLES, LAST, MOST, copied_rows, folder_names, write_cycles
from ftcore.sharing.lock import LOCK, Facts, facts, write_lock
from ftcore.sharing.places import RECIPE, own_places

ABSOLUTE = re.compile(r"(?:^|=)[\"']?((?:/|~/)[^\s,\"'\]}]+)")
PLAIN = re.compile(r"[A-Za-z][\w /-]*")  # text that no reader of YAML takes for something else
SCORES = ("loss", "accuracy", "rewards/accuracies", "reward", "probe_perplexity")


@dataclass(frozen=True)
class Part:
    """A finished run as it is packed.

    Args:
        config: what the recipe describes: as it was before stages were made, with rows that are in the package.
        places: key -> path of what the recipe leaves to whoever receives it.
        asked: those that no part of the package gives.
        before: the folder of the cycle before.
    """

    config: Config
    summary: Summary
    found: Facts
    places: dict[str, str]
    asked: dict[str, str]
    before: str | None


def pack(config: Config) -> None:
    """Write recipe.yaml and recipe.lock.json of the finished run `run=` into `output_dir=`, by default `./<name of the run>`.

    Those of the runs that it goes on from are written into folders there, with a cycles.json. Raises `ConfigError` for a run that
    is not finished or that no recipe can describe, `DataError` when its rows have changed.
    """
    target = _target(config)
    chain = _cycles(config)
    with tempfile.TemporaryDirectory() as private:
        root, names = Path(private), folder_names(run["name"] for run in chain)
        pairs = zip(chain, pairwise([None, *names]), strict=True)
        parts = [_part(run, root / str(name), before, len(chain) > 1) for run, (before, name) in pairs]
        asked = _asked_of_all(parts)
        for part, name in zip(parts, names, strict=True):
            _write(part, root / name, asked if name == LAST else part.places)
        if len(parts) > 1:
            write_cycles(root, names)
        _hand_over(root, target)
    cycles = f", and beside them the cycles before it ({len(parts) - 1})" if len(parts) > 1 else ""
    plain.print(f"Wrote {target / RECIPE} and {target / LOCK}{cycles}. Elsewhere:\n  {_command(asked, config)}")


def _target(config: Config) -> Path:
    """The folder to write to. Raises `ConfigError` for another run than the one that is there, `StorageError` for a package."""
    run, _ = _finished(config)
    ran = dict(flatten(run.config))
    target = expanded(config["output_dir"] if config["output_dir"] != ran["output_dir"] else config["name"])
    for file in (target / RECIPE, target / CYCLES):
        if file.exists():
            raise StorageError(f"{file} exists already; remove it, or say where with output_dir=<folder>.")
    if changed := [key for key, value in _described(config).items() if key in ran and ran[key] != value]:
        raise ConfigError(f"pack takes a run as it is: leave {', '.join(changed)} out.")
    return target


def _cycles(config: Config) -> list[Config]:
    """The configs of the runs that a run goes on from by `model.path`, the earliest first, and its own."""
    chain = [_without_made_stages(config)]
    while parent := Run.at(chain[0]["model"]["path"]):
        if len(chain) == MOST:
            raise ConfigError(f"{config['run']} goes on from more than {MOST - 1} runs, which no package holds.")
        words = [f"run={quoted(str(parent))}", f"trust=[{','.join(config['trust'])}]"]
        chain.insert(0, _without_made_stages(load_config(words)))
    return chain


def _part(config: Config, folder: Path, before: str | None, chained: bool) -> Part:
    """A run of a package, checked. Where it is one of several, its votes are copied into its folder."""
    run, summary = _finished(config)
    with torch.device("meta"):  # base and tuned weights are checked, not loaded
        load_run(run)
    data = build(config["data"], Data)
    config = copied_rows(config, folder) if chained else config
    places, records = _places(config), data.load(record_type(config["method"]))
    if records.content_hash != summary["data_sha256"]:
        raise DataError(f"The rows have changed since {run} was made, so its scores cannot be expected of them.")
    made = {BEFORE} if before else set()
    asked = {key: path for key, path in places.items() if Path(path).parent != folder and key not in made}
    found = cast(Facts, {**facts(config, records), **cast(dict[str, object], summary["made_with"])})
    return Part(config, summary, found, places, asked, before)


def _asked_of_all(parts: list[Part]) -> dict[str, str]:
    """What the command line gives to all cycles. Raises `ConfigError` for a key that is another file in each of two."""
    asked: dict[str, tuple[str, object]] = {}
    for part in parts:
        for key, path in part.asked.items():
            known = part.found["files"].get(key, {}).get("sha256")
            if asked.setdefault(key, (path, known))[1] != known:
                raise ConfigError(
                    f"{key} is {Path(asked[key][0]).name} in one cycle and {Path(path).name} in another, and a replay gives one "
                    "value to all. Export the run between them, train from the exported folder, and pack the new run."
                )
    return {key: path for key, (path, _) in asked.items()}


def _write(part: Part, folder: Path, asked: dict[str, str]) -> None:
    """Write recipe and lock of a part. `asked` are the places that its command asks for."""
    folder.mkdir(exist_ok=True)
    recipe = folder / RECIPE
    recipe.write_text(_recipe(part, asked), encoding="utf-8")
    _check_recipe(recipe, part.config, part.places)
    write_lock(folder / LOCK, part.found, part.summary, recipe)


def _hand_over(made: Path, target: Path) -> None:
    """Copy all files of a package to where they belong, or none. The recipe is put there last."""
    files = sorted((file for file in made.rglob("*") if file.is_file()), key=lambda file: file != made / RECIPE)
    with ExitStack() as whole:  # is left backwards
        for file in files:
            shutil.copyfile(file, whole.enter_context(whole_file(target / file.relative_to(made))))


def _finished(config: Config) -> tuple[Run, Summary]:
    """The run that `run=` names, and its summary."""
    if not config["run"]:
        raise ConfigError("`pack` needs run=<folder of a finished run>, such as run=runs/<name>/<time>.")
    run = Run(config["run"])
    if not run.finished or not (summary := run.summary):
        finish = typed("python", "-m", "ftcore", f"resume={run}")
        raise ConfigError(f"{run} has no summary.json, or names a failure in it: finish it ({finish}), then pack it.")
    if changed := changes_of_result(run):
        shown = ", ".join(f"{key}: {change}" for key, change in changed.items())
        raise ConfigError(
            f"{run} went on otherwise than it began ({shown}), so no recipe gives it again. Train it in one piece."
        )
    return run, summary


def _described(config: Config) -> dict[str, object]:
    """What of a config a recipe describes: not how the run was begun or searched for, nor whose W&B or cluster it used."""
    return values_of(config, "result", "rows", "scores", "reporting", "machine")


def _without_made_stages(config: Config) -> Config:
    """The config as it was before its stages were made: they are in it as overrides, and are made again elsewhere."""
    method, model = dict(config["method"]), config["model"]
    words = {name: words for name, words in stages_of(method).items() if method.get(name)}
    made = {name: Run(str(method[name])) for name in words}
    method |= dict.fromkeys(made)
    if "policy" in made and (policy := made["policy"].config):
        model = policy["model"]
    original = cast(Config, {**config, "method": method, "model": model})
    for name, run in made.items():
        if not Run.at(str(run)):
            raise ConfigError(f"method.{name} is {run}, which is no run any more, so nothing tells what it began with.")
        if folder_of(stage_config(original, name, words[name])).name != run.name:
            _refuse_run(f"method.{name}", run)
    return original


def _refuse_run(key: str, run: Run) -> None:
    export = typed("python", "-m", "ftcore", "export", f"run={run}")
    raise ConfigError(
        f"{key} is the run {run}, which only this machine has. Export it ({export}), train from the exported folder "
        f"({typed(f'{key}={run}/export/merged')}), hand that folder on, and pack the new run."
    )


def _places(config: Config) -> dict[str, str]:
    """Key -> path of what the receiver gives. Raises `ConfigError` for runs that no cycle gives, and for places that no override
    could give.
    """
    places = dict(own_places(config))
    for key, path in places.items():
        if key != BEFORE and role_of(key, config).path == "weights" and (run := Run.at(path)):
            _refuse_run(key, run)
    for key, value in _described(config).items():
        found = [p for p in ABSOLUTE.findall(str(value)) if p.count("/") > 1 and expanded(p).exists()]
        if found and key not in places:
            raise ConfigError(f"{key} names {found[0]}, a place of this machine; a recipe cannot carry it.")
    return places


def _recipe(part: Part, asked: dict[str, str]) -> str:
    """The text of recipe.yaml."""
    config, places, found = part.config, part.places, part.found
    chosen = chosen_options(config)
    if unknown := [f"{group}={option}" for group, option in chosen.items() if option not in options(group)]:
        raise ConfigError(f"{unknown[0]} is no option of this version: a recipe cannot name one of another folder.")
    base = values_of_options(chosen)
    differing: dict[str, object] = {}
    for key, value in _described(config).items():
        named = key == "name" and value == default_name(config)
        if key in places or (base.get(key, ...) != value and not named):
            put(differing, key, "???" if key in places else value)
    if found["model"]["revision"] and "model.path" not in places:  # a branch moves
        put(differing, "model.revision", found["model"]["revision"])
    notes = {key: f"Own: {_known_by(key, path, part)}: give {key}=<path>." for key, path in places.items()}
    lines = [HEADER, *_comments(part, asked), "defaults:"]
    lines += [f"  - override /{group}: {option}" for group, option in chosen.items()]
    return "\n".join([*lines, *_lines(differing, notes)]) + "\n"


def _comments(part: Part, asked: dict[str, str]) -> Iterator[str]:
    config, summary = part.config, part.summary
    names = " ".join(f"{group}={config['choices'][group]}" for group in (*NAMED_AFTER, "adapter"))
    yield f"# For: the run {config['name']} again: {names}."
    memory, seconds = summary.number("peak_memory_gb"), summary.number("seconds")
    yield f"# Needs: {memory:.1f} GB of memory; it took {seconds:.0f} s on {part.found['machine']['device']}."
    yield f"# {_command(asked, config)}"
    base, tuned = summary.side("base"), summary.side("tuned")
    both = {key: (a, b) for key in SCORES if None not in (a := base.get(key), b := tuned.get(key))}
    gave = [f"{key} {a:.4g} -> {b:.4g}" for key, (a, b) in both.items()]
    yield f"# Gave: {', '.join(gave) or 'no scores'} on {tuned.get('rows', 0)} held-out rows (seed {config['seed']})."


def _command(asked: dict[str, str], config: Config) -> str:
    given = [f"{key}=<path>" for key in asked] + [f"trust=[{','.join(config['trust'])}]"] * bool(config["trust"])
    return " ".join([f"python -m ftcore replay recipe={RECIPE}", *given, "expect=true"])


def _known_by(key: str, path: str, part: Part) -> str:
    """Name and hash of a file or of an earlier cycle's weights, in a comment."""
    name, found = Path(path).name if Path(path).name.isprintable() else "a file", part.found
    if key != BEFORE:
        return f"{name}, SHA-256 {found['files'][key]['sha256']}"
    made = f"the run of {part.before}" if part.before else name
    return f"{made}, SHA-256 {', '.join(found['model']['weights'].values())}"


def _lines(node: Mapping[str, object], notes: dict[str, str], path: str = "") -> Iterator[str]:
    """YAML with comments above the keys that have a note."""
    for key, value in node.items():
        inner, pad = f"{path}.{key}".strip("."), "  " * path.count(".") + "  " * bool(path)
        if inner in notes:
            yield f"{pad}# {notes[inner]}"
        nested = value if isinstance(value, dict) else {}
        yield f"{pad}{_scalar(key)}:" + ("" if nested else f" {_scalar(value)}")
        yield from _lines(nested, notes, inner)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 and OmegaConf read differently, such as 1e3."""

    def ignore_aliases(self, data: object) -> bool:
        """The same list twice is written twice: recipes have no aliases."""
        return True


_Dumper.add_representer(str, lambda d, s: d.represent_scalar(TEXT, s, style=None if PLAIN.fullmatch(s) else '"'))


def _scalar(value: object) -> str:
    """A value on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=2**31, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _check_recipe(recipe: Path, config: Config, places: dict[str, str]) -> None:
    """Raise `ConfigError` unless the recipe passes the rules and composes to the run's config."""
    given = [f"{key}={quoted(path)}" for key, path in places.items()]
    try:
        again = dict(flatten(load_config([*given, f"trust=[{','.join(config['trust'])}]"], (), recipe)))
    except ConfigError as error:
        raise ConfigError(f"No recipe can describe this run: {error}".replace(str(recipe), RECIPE)) from None
    same = {key: value for key, value in _described(config).items() if key != "model.revision"}
    if lost := [key for key, value in same.items() if again.get(key, ...) != value]:
        raise ConfigError(f"No recipe can describe this run: {', '.join(lost)} would be different.")
