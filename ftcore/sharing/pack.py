"""`pack`: a recipe and a lock of a finished run, for others to `replay`.

The recipe holds what differs from the shipped conf/ and no place of the machine it comes from: own files are known by name and
hash, and who receives it gives theirs on the command line. What it depends on beside that is in the lock.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
import yaml

from ftcore.config.build import build, record_type
from ftcore.config.compose import compose, default_name, load_config, read_overrides
from ftcore.config.given import quoted
from ftcore.config.options import options
from ftcore.config.recipe_rules import HEADER, TEXT
from ftcore.config.roles import role_of, values_of
from ftcore.config.tree import flatten, put
from ftcore.console import plain, typed
from ftcore.data.records import Data
from ftcore.errors import ConfigError, DataError, StorageError
from ftcore.files import expanded, whole_file
from ftcore.models.foundation import load_run
from ftcore.run_folder import Run, Summary
from ftcore.runs.folder import changes_of_result
from ftcore.runs.stages import folder_of, stage_config, stages_of
from ftcore.settings import CHOSEN, NAMED_AFTER, Config
from ftcore.sharing.lock import LOCK, Facts, facts, write_lock
from ftcore.sharing.places import RECIPE, own_places

ABSOLUTE = re.compile(r"(?:^|=)[\"']?((?:/|~/)[^\s,\"'\]}]+)")
PLAIN = re.compile(r"[A-Za-z][\w /-]*")  # text that no reader of YAML takes for something else
SCORES = ("loss", "accuracy", "rewards/accuracies", "reward", "probe_perplexity")


def pack(config: Config) -> None:
    """Write recipe.yaml and recipe.lock.json of the finished run `run=` into `output_dir=`, by default `./<name of the run>`.

    Raises `ConfigError` for a run that is not finished or that no recipe can describe, `DataError` when its rows have changed.
    """
    run, summary = _finished(config)
    ran = dict(flatten(run.config))
    target = expanded(config["output_dir"] if config["output_dir"] != ran["output_dir"] else config["name"])
    if (target / RECIPE).exists():
        raise StorageError(f"{target / RECIPE} exists already; remove it, or say where with output_dir=<folder>.")
    with torch.device("meta"):  # base and tuned weights are checked, not loaded
        load_run(run)
    if changed := [key for key, value in _described(config).items() if key in ran and ran[key] != value]:
        raise ConfigError(f"pack takes a run as it is: leave {', '.join(changed)} out.")
    original = _without_made_stages(config)
    places = _places(original)
    records = build(config["data"], Data).load(record_type(config["method"]))
    if records.content_hash != summary["data_sha256"]:
        raise DataError(f"The rows have changed since {run} was made, so its scores cannot be expected of them.")
    found = cast(Facts, {**facts(original, records), **cast(dict[str, object], summary["made_with"])})
    with tempfile.TemporaryDirectory() as private:
        recipe = Path(private) / RECIPE
        recipe.write_text(_recipe(original, summary, places, found), encoding="utf-8")
        _check_recipe(recipe, original, places)
        with whole_file(target / RECIPE) as beside, whole_file(target / LOCK) as lock:  # both or none
            write_lock(lock, found, summary, recipe)
            shutil.copyfile(recipe, beside)
    plain.print(f"Wrote {target / RECIPE} and {target / LOCK}. Elsewhere:\n  {_command(places, config)}")


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
    """Key -> path of what the receiver gives. Raises `ConfigError` for runs and for places that no override could give."""
    places = dict(own_places(config))
    for key, path in places.items():
        if role_of(key, config).path == "weights" and (run := Run.at(path)):
            _refuse_run(key, run)
    for key, value in _described(config).items():
        found = [p for p in ABSOLUTE.findall(str(value)) if p.count("/") > 1 and expanded(p).exists()]
        if found and key not in places:
            raise ConfigError(f"{key} names {found[0]}, a place of this machine; a recipe cannot carry it.")
    return places


def _recipe(config: Config, summary: Summary, places: dict[str, str], found: Facts) -> str:
    """The text of recipe.yaml."""
    chosen = {group: option for group in CHOSEN if (option := config["choices"].get(group))}
    if unknown := [f"{group}={option}" for group, option in chosen.items() if option not in options(group)]:
        raise ConfigError(f"{unknown[0]} is no option of this version: a recipe cannot name one of another folder.")
    base = dict(flatten(compose(read_overrides([f"{group}={option}" for group, option in chosen.items()]), [], [])))
    differing: dict[str, object] = {}
    for key, value in _described(config).items():
        named = key == "name" and value == default_name(config)
        if key in places or (base.get(key, ...) != value and not named):
            put(differing, key, "???" if key in places else value)
    if found["model"]["revision"] and "model.path" not in places:  # a branch moves
        put(differing, "model.revision", found["model"]["revision"])
    notes = {key: f"{_known_by(key, path, found)}: give {key}=<path>." for key, path in places.items()}
    lines = [HEADER, *_comments(config, summary, places, found), "defaults:"]
    lines += [f"  - override /{group}: {option}" for group, option in chosen.items()]
    return "\n".join([*lines, *_lines(differing, notes)]) + "\n"


def _comments(config: Config, summary: Summary, places: dict[str, str], found: Facts) -> Iterator[str]:
    names = " ".join(f"{group}={config['choices'][group]}" for group in (*NAMED_AFTER, "adapter"))
    yield f"# For: the run {config['name']} again: {names}."
    memory, seconds = summary.number("peak_memory_gb"), summary.number("seconds")
    yield f"# Needs: {memory:.1f} GB of memory; it took {seconds:.0f} s on {found['machine']['device']}."
    yield f"# {_command(places, config)}"
    base, tuned = summary.side("base"), summary.side("tuned")
    both = {key: (a, b) for key in SCORES if None not in (a := base.get(key), b := tuned.get(key))}
    gave = [f"{key} {a:.4g} -> {b:.4g}" for key, (a, b) in both.items()]
    yield f"# Gave: {', '.join(gave) or 'no scores'} on {tuned.get('rows', 0)} held-out rows (seed {config['seed']})."


def _command(places: dict[str, str], config: Config) -> str:
    given = [f"{key}=<path>" for key in places] + [f"trust=[{','.join(config['trust'])}]"] * bool(config["trust"])
    return " ".join([f"python -m ftcore replay recipe={RECIPE}", *given, "expect=true"])


def _known_by(key: str, path: str, found: Facts) -> str:
    """Name and hash of a file, in a comment."""
    name = Path(path).name if Path(path).name.isprintable() else "a file"
    hashes = found["model"]["weights"].values() if key == "model.path" else [found["files"][key]["sha256"]]
    return f"Own: {name}, SHA-256 {', '.join(map(str, hashes))}"


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
