"""What ftcore keeps on the disk, and how to get rid of it: `python -m ftcore storage [delete=checkpoints] [yes=true]`.

FTCORE_HOME holds foundation weights and their hashes, tokenised rows, the base model's scores and log-probabilities, activations
and stages; `output_dir` holds runs with their checkpoints. Nothing outside these two is ever deleted, nor what a running process
holds, what another run needs, or the checkpoints of a run that can still go on.
"""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from ftcore.config.check import closest
from ftcore.config.compose import read_overrides
from ftcore.console import plain
from ftcore.errors import ConfigError
from ftcore.files import expanded, home
from ftcore.run_folder import Run
from ftcore.settings import StorageArguments

# Folders of FTCORE_HOME and what is in them.
CACHES = {"models": "weights"}
CACHES |= {name: name for name in ("rows", "scores", "references", "activations", "hashes", "stages")}
KINDS = (*CACHES.values(), "runs", "checkpoints")


@dataclass(frozen=True)
class Item:
    """Something on the disk: what kind, where, in which of the two folders, who holds it, why it stays ("" when it need not)."""

    kind: str
    path: Path
    root: Path
    lock: Path
    stays: str = ""

    @property
    def files(self) -> list[Path]:
        """Its files; links are not followed."""
        if self.path.is_file():
            return [self.path]
        return [] if self.path.is_symlink() else [f for f in self.path.rglob("*") if f.is_file() and not f.is_symlink()]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.stat().st_size for file in self.files)


def storage(arguments: StorageArguments, words: list[str], config_dirs: tuple[Path, ...]) -> list[dict[str, object]]:
    """List what is kept, or delete some of it. Raises `ConfigError` for words and names that are none."""
    given = {o.key_or_group: str(o.value()) for o in read_overrides(words)}
    for name in given.keys() - {"output_dir"}:
        raise ConfigError(f"storage does not take {name}{closest(name, ('output_dir', *arguments))}")
    items = list(_items(expanded(given.get("output_dir", "runs")).resolve()))
    if arguments["delete"] is None:
        plain.print(_table(items))
        plain.print(f"Delete with: storage delete=checkpoints (or {', '.join(CACHES.values())}, or one of the paths)")
    else:
        asked = arguments["delete"]
        if isinstance(asked, str):  # a path may have commas
            asked = [asked] if expanded(asked).exists() else asked.split(",")
        chosen = [item for name in asked for item in _named(name.strip(), items)]
        freed = sum(_delete(item, arguments["yes"]) for item in chosen)
        plain.print(f"{decimal(freed)} {'freed' if arguments['yes'] else 'to free. Do it with yes=true'}.")
    return [{"kind": item.kind, "path": str(item.path), "bytes": item.size, "stays": item.stays} for item in items]


def _items(output_dir: Path) -> Iterator[Item]:
    runs = Run.below(output_dir)
    for folder, kind in CACHES.items():
        for path in sorted((home() / folder).glob("*")):
            if path.suffix != ".lock":
                lock = path.with_name(f"{path.name}.lock")
                yield Item(kind, path, home().resolve(), lock, _needed(path, runs) if kind == "stages" else "")
    for run in runs:
        yield Item("runs", run.folder, output_dir, run.lock, _needed(run.folder, runs))
        if run.checkpoints.is_dir():
            stays = "" if run.finished else "the run can go on"
            yield Item("checkpoints", run.checkpoints, output_dir, run.lock, stays)


def _needed(path: Path, runs: list[Run]) -> str:
    """Which run was made from what lies at `path`; "" for none."""
    users = [run for run in runs if path in [parent.folder for parent in run.parents]]
    return f"{users[-1]} needs it" if users else ""


def _table(items: list[Item]) -> Table:
    """A line for each item, and the sum of each kind."""
    texts = (Column(title, overflow="fold") for title in ("kind", "where", "why it stays"))
    numbers = (Column(title, justify="right", no_wrap=True) for title in ("size", "files", "last used"))
    table = Table(*texts, *numbers)
    for kind in KINDS:
        found = [item for item in items if item.kind == kind]
        for item in found:
            used = max((file.stat().st_atime for file in item.files), default=0.0)
            when = time.strftime("%Y-%m-%d", time.localtime(used)) if used else ""
            table.add_row(kind, str(item.path), item.stays, decimal(item.size), str(len(item.files)), when)
        table.add_row(Text(kind, "bold"), "", "", decimal(sum(item.size for item in found)), end_section=True)
    return table


def _named(name: str, items: list[Item]) -> list[Item]:
    """The items of a kind, or the one of a path."""
    if name == "runs":
        raise ConfigError("delete=runs would delete every result: name the run folders.")
    path = Path(os.path.abspath(expanded(name)))  # a link stays a link
    found = [item for item in items if name == item.kind or path == item.path]
    if not found and name not in KINDS:
        raise ConfigError(f"delete={name} is neither a kind nor a path of the list{closest(name, KINDS)}")
    return found


def _delete(item: Item, yes: bool) -> int:
    """Say whether an item stays and, with `yes`, delete it if not; returns the bytes that this frees."""
    size, stays = item.size, item.stays
    try:
        with FileLock(item.lock, timeout=0):
            if yes and not stays:
                _remove(item)
    except Timeout:
        stays = "in use"
    freed = 0 if stays else size
    done = f"stays ({stays})" if stays else "deleted" if yes else "would go"
    plain.print(f"{done}: {item.path}, {decimal(freed)}")
    return freed


def _remove(item: Item) -> None:
    """Move it aside first, so that nothing half deleted is ever taken for complete."""
    if item.path.is_symlink() or item.path.is_file():
        item.path.unlink()
    elif item.path.resolve().is_relative_to(item.root) and item.path.resolve() != item.root:
        aside = item.path.with_name(f".{item.path.name}.deleted")
        item.path.rename(aside)
        shutil.rmtree(aside)
