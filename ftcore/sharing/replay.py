"""Recipes of others: `replay` runs a packed one and compares with its lock, `check` says all that is wrong with one."""

import json
import re
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ftcore.config.compose import load_config
from ftcore.errors import ConfigError, DataError, FtcoreError, ModelError
from ftcore.models.weights import sha256
from ftcore.settings import Config
from ftcore.sharing.places import ROWS, console, not_weights, own_places, own_words, recipe_file


class OtherScores(FtcoreError):  # noqa: N818
    """A replayed run gave other scores than its lock holds."""

    exit_code = 1


def replay(words: list[str], config_dirs: tuple[Path, ...]) -> None:
    """Run `recipe=` as `train` would and tell what differs from its lock; with `expect=true` the scores must be the lock's.

    `tolerance=` takes the place of the lock's. Raises `DataError` or `ModelError` before training when rows or weights are
    others and the scores are expected, and `OtherScores` when they are not the lock's.
    """
    from ftcore.runs.start import train
    from ftcore.sharing.lock import differences, disagreements, facts, read_lock

    given, rest = own_words(words, ("recipe", "expect", "tolerance"))
    recipe, expect, allowed = recipe_file(given), _truth(given), _share(given)
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
