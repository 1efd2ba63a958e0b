"""Recipes of others: `replay` runs a packed one and compares with its lock, `check` says all that is wrong with one."""

import re
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ftcore.config.compose import load_config
from ftcore.config.roles import role_of
from ftcore.config.trust import hand_down
from ftcore.console import plain as console
from ftcore.data.records import Records
from ftcore.errors import ConfigError, DataError, FtcoreError, ModelError
from ftcore.files import sha256
from ftcore.runs.start import train
from ftcore.settings import Config, ReplayArguments
from ftcore.sharing.lock import Lock, differences, disagreements, facts, read_lock
from ftcore.sharing.places import not_weights, own_places, recipe_file


class OtherScores(FtcoreError):  # noqa: N818
    """A replayed run gave other scores than its lock holds."""

    exit_code = 1


def replay(arguments: ReplayArguments, words: list[str], config_dirs: tuple[Path, ...]) -> None:
    """Run `recipe=` as `train` would and tell what differs from its lock; with `expect=true` the scores must be the lock's.

    `tolerance=` takes the place of the lock's. Raises `DataError` or `ModelError` before training when rows or weights are
    others and the scores are expected, and `OtherScores` when they are not the lock's.
    """
    recipe, expect = recipe_file(arguments["recipe"]), arguments["expect"]
    lock = read_lock(recipe.with_suffix(".lock.json"))
    config = load_config(words, config_dirs, recipe)
    hand_down(config)
    if expect:
        _refuse_to_expect(config, lock)

    def compare(config: Config, records: Records) -> None:
        found = facts(config, records, not_weights(dict(own_places(config))))
        found["recipe"] = sha256(recipe)
        _tell(differences(lock, found), words)
        if expect:
            _refuse_others(differences(lock, found), config)

    run = train(config, compare)
    if expect and run and (summary := run.summary):
        _judge(disagreements(lock, summary, arguments["tolerance"]))


def _refuse_to_expect(config: Config, lock: Lock) -> None:
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


def _refuse_others(differing: list[tuple[str, str, str]], config: Config) -> None:
    """Rows or weights that are others cannot give the lock's scores."""
    paths = [path for path, _, _ in differing]
    # Files of rows are compared row by row.
    files = [p for p in paths if re.fullmatch(r"files\..*\.sha256", p)]
    rows = [p for p in paths if p.startswith("rows.")]
    rows += [p for p in files if role_of(p[len("files.") : -len(".sha256")], config).path != "rows"]
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
