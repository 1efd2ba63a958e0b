"""`replay`: run a packed recipe, after those of the cycles before it, and compare with its lock."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from ftcore.config.roles import role_of
from ftcore.config.trust import hand_down
from ftcore.console import plain
from ftcore.data.records import Records
from ftcore.errors import ConfigError, DataError, FtcoreError, ModelError
from ftcore.files import sha256
from ftcore.machine import torchrun
from ftcore.run_folder import Run, Summary
from ftcore.runs.start import train
from ftcore.settings import Config, ReplayArguments
from ftcore.sharing.cycles import BEFORE, Cycle, load_cycle, load_cycles, read_cycles, words_of_each
from ftcore.sharing.lock import Lock, differences, disagreements, facts, read_lock, rounds_otherwise
from ftcore.sharing.places import recipe_file


class OtherScores(FtcoreError):  # noqa: N818
    """A replayed run gave other scores than its lock holds."""


@dataclass(frozen=True)
class Command:
    """What was typed: the verb's arguments, the other words, and the folders of --config-dir."""

    arguments: ReplayArguments
    words: list[str]
    config_dirs: tuple[Path, ...]


def replay(arguments: ReplayArguments, words: list[str], config_dirs: tuple[Path, ...]) -> None:
    """Run `recipe=` as `train` would and show what differs from its lock; with `expect=true` the scores must be the lock's.

    The recipes that a cycles.json beside it names run before it, each on the run of the one before. `tolerance=` replaces the
    lock's own. Raises `DataError` or `ModelError` before training when scores are expected and rows or weights differ, and
    `OtherScores` when the scores are not the lock's.
    """
    recipe, command = recipe_file(arguments["recipe"]), Command(arguments, words, config_dirs)
    if not (cycles := read_cycles(recipe)):
        _replay(recipe, command, {})
        return
    _check_all(cycles, command)
    run = None
    for number, (cycle, own) in enumerate(zip(cycles, words_of_each(cycles, words), strict=True), 1):
        plain.print(f"Cycle {number} of {len(cycles)}: {cycle.recipe}")
        if not (run := _replay(cycle.recipe, replace(command, words=own), cycle.given(run))):
            plain.print("The later cycles begin with the run that was not made.")
            return


def _check_all(cycles: list[Cycle], command: Command) -> None:
    """Raise `ConfigError` for what is wrong with any cycle, before the first one trains."""
    if torchrun.started():
        raise ConfigError(
            "The cycles of a package run one after another, each in processes of its own: start `replay` alone, not by torchrun."
        )
    for cycle, config in zip(cycles, load_cycles(cycles, command.words, command.config_dirs), strict=True):
        if config["hardware"]["slurm"]:
            raise ConfigError(
                "A cycle begins when the one before has ended; a job of SLURM ends later: choose other hardware."
            )
        lock = read_lock(cycle.recipe.with_suffix(".lock.json"))
        if command.arguments["expect"]:
            _refuse_to_expect(config, lock)


def _replay(recipe: Path, command: Command, given: Mapping[str, str]) -> Run | None:
    """Run a recipe and compare. `given`: key -> path of what it leaves open and its package has."""
    expect, tolerance = command.arguments["expect"], command.arguments["tolerance"]
    lock = read_lock(recipe.with_suffix(".lock.json"))
    config = load_cycle(recipe, given, command.words, command.config_dirs)
    hand_down(config)
    if expect:
        _refuse_to_expect(config, lock)

    def compare(config: Config, records: Records) -> None:
        found = facts(config, records)
        found["recipe"] = sha256(recipe)
        differing = differences(lock, found)
        changed = [("command line", "", word) for word in command.words]
        if differing or changed:
            _print("Differs from the lock", ("what", "in the lock", "here"), [*differing, *changed])
        else:
            plain.print("Nothing differs from the lock: versions, machine, weights, template and rows are the same.")
        if expect:
            paths = [path for path, _, _ in differing]
            rounds = BEFORE in given and (tolerance is not None or rounds_otherwise(lock, paths))
            _refuse_others([path for path in paths if not (rounds and path.startswith("model.weights."))], config)

    run = train(config, compare)
    if expect and run and (summary := run.summary):
        _refuse_other_scores(lock, summary, tolerance)
    return run


def _refuse_other_scores(lock: Lock, summary: Summary, tolerance: float | None) -> None:
    """Say that the scores are the lock's. Raises `OtherScores` when they are not."""
    if differing := disagreements(lock, summary, tolerance):
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
