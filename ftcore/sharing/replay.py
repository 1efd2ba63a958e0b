"""`replay`: run a packed recipe and compare with its lock."""

import re
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from ftcore.config.compose import load_config
from ftcore.config.roles import role_of
from ftcore.config.trust import hand_down
from ftcore.console import plain
from ftcore.data.records import Records
from ftcore.errors import ConfigError, DataError, FtcoreError, ModelError
from ftcore.files import sha256
from ftcore.runs.start import train
from ftcore.settings import Config, ReplayArguments
from ftcore.sharing.lock import Lock, differences, disagreements, facts, read_lock
from ftcore.sharing.places import recipe_file


class OtherScores(FtcoreError):  # noqa: N818
    """A replayed run gave other scores than its lock holds."""


def replay(arguments: ReplayArguments, words: list[str], config_dirs: tuple[Path, ...]) -> None:
    """Run `recipe=` as `train` would and show what differs from its lock; with `expect=true` the scores must be the lock's.

    `tolerance=` replaces the lock's own. Raises `DataError` or `ModelError` before training when scores are expected and rows or
    weights differ, and `OtherScores` when the scores are not the lock's.
    """
    recipe, expect = recipe_file(arguments["recipe"]), arguments["expect"]
    lock = read_lock(recipe.with_suffix(".lock.json"))
    config = load_config(words, config_dirs, recipe)
    hand_down(config)
    if expect:
        _refuse_to_expect(config, lock)

    def compare(config: Config, records: Records) -> None:
        found = facts(config, records)
        found["recipe"] = sha256(recipe)
        differing = differences(lock, found)
        changed = [("command line", "", word) for word in words]
        if differing or changed:
            _print("Differs from the lock", ("what", "in the lock", "here"), [*differing, *changed])
        else:
            plain.print("Nothing differs from the lock: versions, machine, weights, template and rows are the same.")
        if expect:
            _refuse_others([path for path, _, _ in differing], config)

    run = train(config, compare)
    if expect and run and (summary := run.summary):
        if differing := disagreements(lock, summary, arguments["tolerance"]):
            _print("Other scores than the lock's", ("score", "expected", "seen"), differing)
            raise OtherScores(
                f"{len(differing)} scores are not those of the lock; the tables say what else differs. On other hardware or "
                "versions rounding does: tolerance=1e-2 allows one percent."
            )
        plain.print("The scores are those of the lock.")


def _refuse_to_expect(config: Config, lock: Lock) -> None:
    if config["hardware"]["slurm"]:
        raise ConfigError("expect=true waits for the scores, and a job of SLURM ends later: choose other hardware.")
    if not lock["expected"]["tuned"] or not config["evaluate"]["enabled"]:
        raise ConfigError("expect=true needs scores: the packed run or this one has evaluate.enabled=false.")


def _print(title: str, columns: tuple[str, ...], rows: list[tuple[str, str, str]]) -> None:
    table = Table(*(Column(column, overflow="fold") for column in columns), title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))
    plain.print(table)


def _refuse_others(differing: list[str], config: Config) -> None:
    """Raise `DataError` or `ModelError`: with other rows or weights the lock's scores cannot be expected."""
    files = [match[1] for path in differing if (match := re.fullmatch(r"files\.(.*)\.sha256", path))]
    rows = [path for path in differing if path.startswith("rows.")]
    # Files of rows are compared row by row.
    rows += [f"files.{key}.sha256" for key in files if role_of(key, config).path != "rows"]
    weights = [path for path in differing if re.match(r"model\.(weights|tokenizer|chat_template)\b", path)]
    for found, name, kind in ((rows, "rows", DataError), (weights, "weights", ModelError)):
        if found:
            differ = f"these {name} differ: {', '.join(found)}"
            raise kind(f"The lock's scores cannot be expected, since {differ}. Leave expect=true out.")
