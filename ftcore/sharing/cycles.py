"""cycles.json: which recipes of a package follow from each other, in order, with the SHA-256 of every file of theirs.

The model of each cycle begins with the run that the cycle before gave, and its votes lie beside its recipe. The last cycle is the
package's own folder. The file may come from anywhere: it is read as data of a known shape, and names nothing but files of known
names in folders of known names beside it.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ftcore.config.check import Problem
from ftcore.config.compose import load_config, read_overrides
from ftcore.config.given import quoted
from ftcore.config.recipe_rules import staged_recipes
from ftcore.data.votes import EXPORT, HELD_OUT, as_lines, votes_file
from ftcore.errors import ConfigError
from ftcore.files import resolve, sha256, write_json
from ftcore.run_folder import Run
from ftcore.settings import Config
from ftcore.sharing.lock import HASH, LOCK
from ftcore.sharing.places import RECIPE

CYCLES = "cycles.json"
FORMAT = 1
# Files of rows in a package -> the keys that they are given to.
ROWS = {EXPORT: "data.path", HELD_OUT: "data.splits.test"}
BEFORE = "model.path"  # the key that the run of the cycle before is given to
LAST = "."
MAX_BYTES, MOST = 100_000, 100  # of the file, and cycles
Check = Callable[[Config], Iterable[Problem]]


@dataclass(frozen=True)
class Cycle:
    """The part of a package that makes one run.

    Args:
        folder: where its recipe lies.
        files: name -> SHA-256 of its files.
    """

    folder: Path
    files: dict[str, str]

    @property
    def recipe(self) -> Path:
        """Its recipe."""
        return self.folder / RECIPE

    def given(self, before: Run | None) -> dict[str, str]:
        """Key -> path of what its recipe leaves open and the package has; `before` is the run of the cycle before."""
        rows = {key: str((self.folder / name).absolute()) for name, key in ROWS.items() if name in self.files}
        return rows | ({BEFORE: str(before)} if before else {})

    def check(self) -> None:
        """Raise `ConfigError` for a file that is not there, is a link, or has changed."""
        for name, expected in self.files.items():
            file = self.folder / name
            linked = self.folder.is_symlink() or file.is_symlink()
            if linked or not file.is_file() or sha256(file) != expected:
                why = "is a link" if linked else "has changed (SHA-256 differs)" if file.is_file() else "is not there"
                raise ConfigError(f"{file} {why}: {CYCLES} names it with its hash. Copy the package again.")


def folder_names(names: Iterable[str]) -> list[str]:
    """The folders of cycles with these names, the last of which is the package's own."""
    numbered = [f"{k}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)[:80]}" for k, name in enumerate(names, 1)]
    return [*numbered[:-1], LAST]


def copied_rows(config: Config, folder: Path) -> Config:
    """Copy the votes of a cycle, and held-out rows that lie beside them, into its folder; the config that reads the copies.

    Raises `ConfigError` where rows are private.
    """
    if not (votes := votes_file(config["data"])):
        return config
    if config["private"]:
        raise ConfigError(
            f"{config['run']} is private=true and was trained on votes, which a package of cycles holds: it is not packed. "
            "Hand on its export instead, or train the cycles again without private=true."
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EXPORT).write_bytes(as_lines(votes))
    splits = {**cast(dict[str, str | None], config["data"]["splits"]), "train": None}
    test = Path(resolve(splits["test"] or ""))
    if test.suffix == ".jsonl" and test.is_file() and test.resolve().parent == votes.resolve().parent:
        (folder / HELD_OUT).write_bytes(test.read_bytes())
        splits["test"] = str(folder / HELD_OUT)
    return {**config, "data": {**config["data"], "path": str(folder / EXPORT), "splits": splits}}


def write_cycles(root: Path, names: Iterable[str]) -> None:
    """Write cycles.json of the package in a folder, whose cycles are in the folders of these names."""
    cycles = [{"folder": name, "files": _hashes(root / name)} for name in names]
    write_json(root / CYCLES, {"format": FORMAT, "cycles": cycles})


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}


def read_cycles(recipe: Path) -> list[Cycle]:
    """The cycles of the package that a recipe is the last of, checked; [] where no cycles.json lies beside it.

    Raises `ConfigError` for one that is none, that leads elsewhere, or whose files are others.
    """
    file = recipe.with_name(CYCLES)
    if recipe.name != RECIPE or not (file.exists() or file.is_symlink()):
        return []
    try:
        found = _bounded(file)
        right = found.keys() == {"format", "cycles"} and found["format"] == FORMAT and _are_cycles(found["cycles"])
    except (ValueError, AttributeError, TypeError, RecursionError):
        right = False
    if not right:
        raise ConfigError(
            f"{file} is not the {CYCLES} of a package (format {FORMAT}): it names folders beside it, such as 1-first, and "
            "their files. Copy the package again."
        )
    parts = cast(list[dict[str, object]], found["cycles"])
    cycles = [Cycle(recipe.parent / str(part["folder"]), cast(dict[str, str], part["files"])) for part in parts]
    for cycle in cycles:
        cycle.check()
    return cycles


def load_cycle(
    recipe: Path, given: Mapping[str, str], words: list[str], config_dirs: tuple[Path, ...], more: Check = lambda _: ()
) -> Config:
    """The config of a recipe with the words of a command line and what its package gives."""
    return load_config([*words, *(f"{k}={quoted(v)}" for k, v in given.items())], config_dirs, recipe, more)


def load_cycles(
    cycles: list[Cycle], words: list[str], config_dirs: tuple[Path, ...], more: Check = lambda _: ()
) -> list[Config]:
    """The configs of all cycles; a cycle's folder stands for its run there. Raises `ConfigError` for what is wrong with one."""
    parts = zip(cycles, _given(cycles), words_of_each(cycles, words), strict=True)
    return [load_cycle(cycle.recipe, given, own, config_dirs, more) for cycle, given, own in parts]


def words_of_each(cycles: list[Cycle], words: list[str]) -> list[list[str]]:
    """The words of a command line that each cycle takes: all, but what the package gives and what another cycle asks for.

    A cycle asks for a key that its recipe leaves open and the package does not give.
    """
    keys = {word: str(read_overrides([word])[0].key_or_group) for word in words}
    given = _given(cycles)
    asked = [_left_open(cycle.recipe) - one.keys() for cycle, one in zip(cycles, given, strict=True)]
    others = [set().union(*asked) - own | one.keys() for own, one in zip(asked, given, strict=True)]
    return [[word for word in words if keys[word] not in left] for left in others]


def _given(cycles: list[Cycle]) -> list[dict[str, str]]:
    """What the package gives to each cycle; folders stand for runs."""
    runs = [None, *(Run(cycle.folder) for cycle in cycles[:-1])]
    return [cycle.given(before) for cycle, before in zip(cycles, runs, strict=True)]


def _left_open(recipe: Path) -> set[str]:
    """The keys that a recipe leaves to the command line."""
    with staged_recipes([("recipes", recipe)]) as staged:
        return staged.required


def _bounded(file: Path) -> dict[str, object]:
    """The JSON of a file. Raises `ValueError` for a link and for what is too large."""
    if file.is_symlink():
        raise ValueError
    with file.open("rb") as stream:
        return dict(json.loads(stream.read(MAX_BYTES + 1)))


def _are_cycles(cycles: object) -> bool:
    """Whether every folder is called by its number, the last one is the package's own, and all files are of a package."""
    if not isinstance(cycles, list) or not 2 <= len(cycles) <= MOST:
        return False
    return all(_is_cycle(cycle, k, k == len(cycles)) for k, cycle in enumerate(cycles, 1))


def _is_cycle(cycle: dict[str, object], number: int, last: bool) -> bool:
    folder, files = cycle.get("folder"), cycle.get("files")
    if len(cycle) != 2 or not isinstance(folder, str) or not isinstance(files, dict):
        return False
    named = folder == LAST if last else bool(re.fullmatch(rf"{number}-[A-Za-z0-9_.-]{{0,80}}", folder))
    hashed = all(isinstance(value, str) and HASH.fullmatch(value) for value in files.values())
    return named and hashed and {RECIPE, LOCK} <= files.keys() <= {RECIPE, LOCK, *ROWS}
