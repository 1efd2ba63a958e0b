"""Recipes of others: `replay` runs a packed one and compares with its lock, `check` says all that is wrong with one."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftcore.config import (
    load_config,
    record_type,
    schemas,
)
from ftcore.errors import ConfigError, DataError, FtcoreError, ModelError
from ftcore.resources import SCHEME, resolve
from ftcore.run_folder import leaves
from ftcore.weights import sha256

Config = dict[str, Any]
# Keys that hold a file or folder of the user's own, unless it is ftcore:// or a name of the hub.
PLACES = re.compile(
    r"model\.(path|chat_template)|data\.(path|cloze|splits\.\w+|records\.\w+\.\w+|sources\.[^.]+\.path)"
    r"|evaluate\.probe|retention\.text|method\.(policy|reward_model)"
)
WEIGHTS = {"model.path", "method.policy", "method.reward_model"}
ROWS = re.compile(r"data\.(path|splits|records|sources)\b")  # places of rows, which are compared one by one
RECIPE = "recipe.yaml"
console = Console(soft_wrap=True, highlight=False, markup=False)


class OtherScores(FtcoreError):  # noqa: N818
    """A replayed run gave other scores than its lock holds."""

    exit_code = 1


def own_places(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of every file or folder of the user's own; a name of the hub is none."""
    for key, value in leaves(config):
        named = PLACES.fullmatch(key) and isinstance(value, str) and not value.startswith(SCHEME)
        if named and (key not in WEIGHTS or value[0] in "/~" or Path(resolve(value)).exists()):
            yield key, value


def not_weights(places: dict[str, str]) -> dict[str, str]:
    """Those that are not the model's own weights, which are looked at by themselves."""
    return {key: path for key, path in places.items() if key != "model.path"}


def replay(words: list[str], config_dirs: tuple[Path, ...]) -> None:
    """Run `recipe=` as `train` would and tell what differs from its lock; with `expect=true` the scores must be the lock's.

    `tolerance=` takes the place of the lock's. Raises `DataError` or `ModelError` before training when rows or weights are
    others and the scores are expected, and `OtherScores` when they are not the lock's.
    """
    from ftcore.__main__ import train
    from ftcore.lock import differences, disagreements, facts, read_lock

    given, rest = _own_words(words, ("recipe", "expect", "tolerance"))
    recipe, expect, allowed = _recipe_file(given), _truth(given), _share(given)
    lock = read_lock(recipe.with_suffix(".lock.json"))
    config = load_config(rest, config_dirs, recipe)
    _refuse_to_expect(config, lock) if expect else None

    def compare(config: Config, records: Any) -> None:
        found = {**facts(config, records, not_weights(dict(own_places(config)))), "recipe": sha256(recipe)}
        _tell(differences(lock, found), rest)
        if expect:
            _refuse_others(differences(lock, found))

    folder = train(config, compare)
    if expect and folder and not config["dry_run"]:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        _judge(disagreements(lock, summary, allowed))


def _own_words(words: list[str], names: tuple[str, ...]) -> tuple[Config, list[str]]:
    """The words that are the verb's own, as name -> value, and those of the config."""
    own = [word for word in words if word.partition("=")[0] in names]
    return dict(word.split("=", 1) for word in own), [word for word in words if word not in own]


def _recipe_file(given: Config) -> Path:
    if not given.get("recipe"):
        raise ConfigError("Which recipe? Give recipe=<file>, such as recipe=recipe.yaml.")
    file = Path(given["recipe"]).expanduser()
    if not file.is_file():
        raise ConfigError(f"There is no recipe file {file.absolute()}.")
    return file


def _truth(given: Config) -> bool:
    if (word := given.get("expect", "false").lower()) not in ("true", "false"):
        raise ConfigError(f"expect={given['expect']} must be true or false.")
    return word == "true"


def _share(given: Config) -> float | None:
    """The number of `tolerance=`."""
    try:
        value = float(given["tolerance"]) if "tolerance" in given else None
    except ValueError:
        value = -1.0
    if value is not None and not 0 <= value < 1:
        raise ConfigError(f"tolerance={given['tolerance']} must be a number from 0 to below 1, such as 1e-3.")
    return value


def _refuse_to_expect(config: Config, lock: Config) -> None:
    if config["hardware"]["slurm"]:
        raise ConfigError(
            "expect=true waits for the scores, and a submitted run ends later: choose another hardware option."
        )
    if not lock["expected"]["tuned"] or not config["evaluate"]["enabled"]:
        raise ConfigError(
            "expect=true needs scores on both sides: the packed run or this one has evaluate.enabled=false."
        )


def _tell(differing: list[tuple[str, str, str]], words: list[str]) -> None:
    """Print what is not as in the lock, and what the command line sets."""
    changed = [("command line", "", word) for word in words]
    if not differing and not changed:
        console.print("Nothing differs from the lock: versions, machine, weights, template and rows are the same.")
        return
    console.print(_table("Differs from the lock", ("what", "in the lock", "here"), [*differing, *changed]))


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, str, str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _refuse_others(differing: list[tuple[str, str, str]]) -> None:
    """Rows or weights that are others cannot give the lock's scores."""
    paths = [path for path, _, _ in differing]
    rows = [
        p for p in paths if p.startswith("rows.") or (re.fullmatch(r"files\..*\.sha256", p) and not ROWS.match(p[6:]))
    ]
    weights = [p for p in paths if re.match(r"model\.(weights|tokenizer|chat_template)\b", p)]
    advice = "with other ones leave expect=true out"
    if rows:
        raise DataError(
            f"The lock's scores are those of other rows; these differ: {', '.join(rows)}. Give the same file, or {advice}."
        )
    if weights:
        raise ModelError(
            f"The lock's scores are those of other weights; these differ: {', '.join(weights)}. Use the same, or {advice}."
        )


def _judge(differing: list[tuple[str, str, str]]) -> None:
    """Say that the scores are the lock's, or raise `OtherScores`."""
    if not differing:
        console.print("The scores are those of the lock.")
        return
    console.print(_table("Other scores than the lock's", ("score", "expected", "seen"), differing))
    raise OtherScores(
        f"{len(differing)} scores are not those of the lock; the tables say what else differs. On other hardware or versions "
        "rounding does: tolerance=1e-2 allows one percent."
    )


def check(words: list[str], config_dirs: tuple[Path, ...]) -> None:
    """Say all that is wrong with a recipe, or what it would train; no model is loaded. Raises `ConfigError` with all of it."""
    given, rest = _own_words(words, ("recipe",))
    recipe = _recipe_file(given) if given else None
    config = load_config(rest, config_dirs, recipe, _absent)
    choices = config["choices"]
    model = config["model"]["path"] or choices["model"]
    rows = f" ({config['data']['path']})" if config["data"]["path"] else ""
    limits = [f"{config['max_steps']} steps"] if config["max_steps"] else []
    limits += [f"{config['max_epochs']:g} passes over the rows"] if config["max_epochs"] else []
    told = "the command line" if recipe is None else recipe
    console.print(
        f"Nothing is wrong with {told}. It would train method={choices['method']} on data={choices['data']}{rows}, "
        f"model={choices['model']} ({model}) with adapter={choices['adapter']}, for {' or '.join(limits)}"
        f"{' (what is less)' * (len(limits) > 1)}, {config['global_batch_size']} rows a step, seed {config['seed']}, on "
        f"hardware={choices['hardware']}; logger={choices['logger']}, as {config['output_dir']}/{config['name']}."
    )


def _absent(config: Config) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for rows and weights that are not there, as far as names tell."""
    from ftcore.data.sources import files_of

    for key, value in leaves(config):
        if not PLACES.fullmatch(key) or not isinstance(value, str):
            continue
        if key == "model.path" or key.startswith("method."):
            local = value.startswith((SCHEME, "/", "~", ".")) or value.count("/") > 1
            if local and not Path(resolve(value)).is_dir():
                yield key, f"names no folder: {Path(resolve(value)).absolute()}"
        elif ROWS.match(key):
            try:
                files_of(value)
            except DataError as error:
                yield key, f"cannot be read: {error}"
    yield from _rows_of_another_type(config)


def _rows_of_another_type(config: Config) -> Iterator[tuple[str, str]]:
    """A method and a data option that do not go together."""
    from ftcore.data.records import DERIVED

    have, target = (config.get("data") or {}).get("records"), (config.get("method") or {}).get("_target_")
    if not isinstance(have, dict) or not have or target not in schemas()["record_types"]:
        return
    needed = record_type({"_target_": target})
    if not {needed, DERIVED.get(needed)} & set(have):
        yield "data.records", f"has no {needed} rows, which the method needs; it has {', '.join(have)}"
