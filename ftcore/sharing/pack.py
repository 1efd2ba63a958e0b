"""`pack`: a recipe and a lock of a finished run, for others to `replay`.

The recipe holds what differs from the shipped conf/ and no place of the machine it comes from: own files are known by name and
hash, and who receives it gives theirs on the command line. What it depends on beside that is in the lock.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ftcore.config.build import build, options, read_config, record_type
from ftcore.config.compose import compose, load_config, read_overrides
from ftcore.config.recipe_rules import HEADER, OVERRIDE_GROUPS
from ftcore.config.tree import leaves
from ftcore.errors import ConfigError, DataError, StorageError
from ftcore.models.weights import is_run
from ftcore.settings import OF_THE_COMMAND, Config
from ftcore.sharing.places import RECIPE, WEIGHTS, console, not_weights, own_places

# What says how a run is begun, watched or searched for, and whose W&B or cluster it uses; not what it computes.
NOT_PACKED = re.compile(
    rf"({'|'.join(OF_THE_COMMAND)}|choices|output_dir|search|sampler|sweep|logger\.(entity|group)|hardware\.slurm\.additional)"
    r"(\..*)?"
)


ABSOLUTE = re.compile(r"(?:^|=)[\"']?((?:/|~/)[^\s,\"'\]}]+)")


PLAIN = re.compile(r"[A-Za-z][\w /-]*")  # text that no reader of YAML takes for something else


GAVE = ("loss", "accuracy", "rewards/accuracies", "reward", "probe_perplexity")


LOCK = "recipe.lock.json"


def pack(config: Config) -> None:
    """Write recipe.yaml and recipe.lock.json of the finished run `run=` into `output_dir=`, by default `./<name of the run>`.

    Raises `ConfigError` for a run that is not finished or cannot be said by a recipe, `DataError` when its rows have changed.
    """
    from ftcore.sharing.lock import facts, row_facts, write_lock

    folder, summary, ran = _finished(config)
    target = Path(
        config["output_dir"] if config["output_dir"] != ran.get("output_dir") else config["name"]
    ).expanduser()
    if (target / RECIPE).exists():
        raise StorageError(f"{target / RECIPE} exists already; remove it, or say where with output_dir=<folder>.")
    original = _without_made_stages(_as_it_ran(config, ran))
    places = _places(original)
    records = build(config["data"]).load(record_type(config["method"]))
    if records.content_hash != summary["data_sha256"]:
        raise DataError(f"The rows have changed since {folder} was made, so its scores cannot be expected of them.")
    found = facts(original, records, not_weights(places)) | summary.get("made_with", {"versions": {}, "machine": {}})
    text = _recipe(original, summary, places, found)
    with tempfile.TemporaryDirectory() as private:
        recipe = Path(private) / RECIPE
        recipe.write_text(text, encoding="utf-8")
        _check_packed(recipe, original, places)
        write_lock(Path(private) / LOCK, found | {"rows": row_facts(records)}, summary, recipe)
        target.mkdir(parents=True, exist_ok=True)
        for name in (LOCK, RECIPE):
            (target / name).write_bytes((Path(private) / name).read_bytes())
    console.print(f"Wrote {target / RECIPE} and {target / LOCK}. Elsewhere:\n  {_command(places, config)}")


def _finished(config: Config) -> tuple[Path, Config, Config]:
    """Folder, summary and config of the run that `run=` names."""
    if not config["run"]:
        raise ConfigError("`pack` needs run=<folder of a finished run>, such as run=runs/<name>/<time>.")
    folder = Path(config["run"]).expanduser()
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} is not finished: it has no summary.json. Go on with it (python -m ftcore resume={folder}), then pack it."
        ) from None
    except ValueError:
        raise ConfigError(f"{folder / 'summary.json'} cannot be read.") from None
    return folder, summary, read_config(folder / "config.yaml")


def _as_it_ran(config: Config, ran: Config) -> Config:
    """The run's config. Raises `ConfigError` when the command line changes it: its scores are those of what ran."""
    now = {key: value for key, value in leaves(config) if not NOT_PACKED.fullmatch(key)}
    then = dict(leaves(ran))
    if changed := [key for key in now if key in then and then[key] != now[key]]:
        raise ConfigError(f"pack takes a run as it is: leave {', '.join(changed)} out.")
    return config


def _without_made_stages(config: Config) -> Config:
    """The config as it was before its stages were made: they are in it as overrides, and are made again elsewhere."""
    from ftcore.runs.stages import folder_of, stage_config

    method, model = dict(config["method"]), config["model"]
    words = {name: words for name, words in method.get("stages", {}).items() if method.get(name)}
    made = {name: Path(method[name]) for name in words}
    method |= dict.fromkeys(made)
    if "policy" in made:
        model = (read_config(made["policy"] / "config.yaml") or {"model": model})["model"]
    original = {**config, "method": method, "model": model}
    for name, folder in made.items():
        if not is_run(str(folder)):
            raise ConfigError(
                f"method.{name} is {folder}, which is no run any more, so nothing tells what it began with."
            )
        if folder_of(stage_config(original, name, words[name])).name != folder.name:
            _refuse_run(f"method.{name}", folder)
    return original


def _refuse_run(key: str, folder: Path) -> None:
    raise ConfigError(
        f"{key} is the run {folder}, which only this machine has. Export it (python -m ftcore export run={folder}), train from "
        f"the exported folder ({key}={folder}/export/merged), hand that folder on, and pack the new run."
    )


def _places(config: Config) -> dict[str, str]:
    """Key -> path of what the receiver gives. Raises `ConfigError` for runs and for places that no override could give."""
    places = dict(own_places(config))
    for key in WEIGHTS & places.keys():
        if is_run(places[key]):
            _refuse_run(key, Path(places[key]))
    for key, value in leaves(config):
        found = [p for p in ABSOLUTE.findall(str(value)) if p.count("/") > 1 and Path(p).expanduser().exists()]
        if found and key not in places and not NOT_PACKED.fullmatch(key):
            raise ConfigError(f"{key} names {found[0]}, a place of this machine; a recipe cannot carry it.")
    return places


def _recipe(config: Config, summary: Config, places: dict[str, str], found: Config) -> str:
    """The text of recipe.yaml."""
    chosen = {group: config["choices"][group] for group in OVERRIDE_GROUPS if config["choices"].get(group)}
    for group, option in chosen.items():
        if option not in options(group):
            raise ConfigError(
                f"{group}={option} is no option of this version: a recipe cannot name one of another folder."
            )
    base = dict(leaves(compose(read_overrides([f"{group}={option}" for group, option in chosen.items()]), [], [])))
    lines = [HEADER, *_head(config, summary, places, found), "defaults:"]
    lines += [f"  - override /{group}: {option}" for group, option in chosen.items()]
    differing: Config = {}
    for key, value in leaves(config):
        if key in places or (
            not NOT_PACKED.fullmatch(key) and base.get(key, ...) != value and not _is_default_name(key, config)
        ):
            _put(differing, key.split("."), "???" if key in places else value)
    if found["model"]["revision"] and "model.path" not in places:  # a branch moves
        _put(differing, ["model", "revision"], found["model"]["revision"])
    notes = {key: f"{_known(key, path, found)}: give {key}=<path>." for key, path in places.items()}
    return "\n".join([*lines, *_lines(differing, notes)]) + "\n"


def _head(config: Config, summary: Config, places: dict[str, str], found: Config) -> Iterator[str]:
    chosen, machine = config["choices"], summary.get("made_with", {}).get("machine", {})
    names = " ".join(f"{group}={chosen[group]}" for group in ("method", "data", "model", "adapter"))
    yield f"# For: the run {config['name']} again: {names}."
    device, seconds = machine.get("device", "its machine"), summary["seconds"]
    yield f"# Needs: {summary['peak_memory_gb']:.1f} GB of memory; it took {seconds:.0f} s on {device}."
    yield f"# {_command(places, config)}"
    base, tuned = summary["base"], summary["tuned"]
    gave = [f"{key} {base[key]:.4g} -> {tuned[key]:.4g}" for key in GAVE if None not in (base.get(key), tuned.get(key))]
    yield f"# Gave: {', '.join(gave) or 'no scores'} on {tuned.get('rows', 0)} held-out rows (seed {config['seed']})."


def _command(places: dict[str, str], config: Config) -> str:
    trust = [f"trust=[{','.join(config['trust'])}]"] if config["trust"] else []
    return " ".join(
        ["python -m ftcore replay", f"recipe={RECIPE}", *(f"{key}=<path>" for key in places), *trust, "expect=true"]
    )


def _known(key: str, path: str, found: Config) -> str:
    """What a file is known by, in a comment."""
    name = Path(path).name if Path(path).name.isprintable() else "a file"
    hashes = found["model"]["weights"].values() if key == "model.path" else [found["files"][key]["sha256"]]
    return f"Own: {name}, SHA-256 {', '.join(hashes)}"


def _is_default_name(key: str, config: Config) -> bool:
    return key == "name" and config["name"] == "-".join(config["choices"][g] for g in ("method", "data", "model"))


def _put(node: Config, path: list[str], value: Any) -> None:
    for part in path[:-1]:
        node = node.setdefault(part, {})
    node[path[-1]] = value


def _lines(node: Config, notes: dict[str, str], path: str = "") -> Iterator[str]:
    """YAML with comments above the keys that have a note."""
    for key, value in node.items():
        inner, pad = f"{path}.{key}".strip("."), "  " * path.count(".") + "  " * bool(path)
        if inner in notes:
            yield f"{pad}# {notes[inner]}"
        if isinstance(value, dict) and value:
            yield f"{pad}{_scalar(key)}:"
            yield from _lines(value, notes, inner)
        else:
            yield f"{pad}{_scalar(key)}: {_scalar(value)}"


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 and OmegaConf read differently, such as 1e3."""

    def ignore_aliases(self, data: Any) -> bool:
        """The same list twice is written twice: recipes have no aliases."""
        return True


_Dumper.add_representer(
    str, lambda d, s: d.represent_scalar("tag:yaml.org,2002:str", s, style=None if PLAIN.fullmatch(s) else '"')
)


def _scalar(value: Any) -> str:
    """A value on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=2**31, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _check_packed(recipe: Path, config: Config, places: dict[str, str]) -> None:
    """Raise `ConfigError` unless the recipe passes the rules and composes to the run's config."""
    given = [f"{key}={json.dumps(path)}" for key, path in places.items()]
    try:
        again = dict(leaves(load_config([*given, f"trust=[{','.join(config['trust'])}]"], (), recipe)))
    except ConfigError as error:
        raise ConfigError(f"A recipe cannot say this run: {error}".replace(str(recipe), RECIPE)) from None
    same = {key: value for key, value in leaves(config) if not NOT_PACKED.fullmatch(key) and key != "model.revision"}
    if lost := [key for key, value in same.items() if again.get(key, ...) != value]:
        raise ConfigError(f"A recipe cannot say this run: {', '.join(lost)} would be another.")
