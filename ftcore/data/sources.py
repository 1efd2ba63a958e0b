"""Where rows come from: a file, a folder, a pattern of names, or a data set of the Hugging Face hub."""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from ftcore.data.formats import COMPRESSED, READERS, Row, read_file
from ftcore.errors import ConfigError, DataError, is_private
from ftcore.files import resolve

__all__ = ["Hub", "Row", "Split", "files_of", "read_hub", "read_rows", "rows_of", "split_files"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Hub(TypedDict):
    """A data set of the Hugging Face hub: its name, configuration and revision, its splits by ours, and its columns."""

    name: str
    config: str | None
    revision: str
    splits: dict[Split, str | None]
    columns: dict[str, str]
    values: dict[str, dict[str, str]]


def read_rows(path: str) -> Iterator[tuple[str, Row | DataError]]:
    """(where, row) of all files that a path means, or what is wrong with the row; `where` is name:line.

    Raises `DataError` when there is no file or no row, or the rest of a file cannot be read.
    """
    root, files = files_of(path)
    empty = True
    for file in files:
        name = file.relative_to(root).as_posix()
        for line, row in read_file(file):
            empty = False
            yield f"{name}:{line}", row
    if empty:
        raise DataError(f"{files[0] if len(files) == 1 else path} has 0 rows.")


def rows_of(path: str) -> Iterator[tuple[str, Row]]:
    """`read_rows` without tolerance: the first wrong row is raised."""
    for where, row in read_rows(path):
        if isinstance(row, DataError):
            raise row
        yield where, row


def read_hub(hub: Hub, split: str) -> Iterator[tuple[str, Row | DataError]]:
    """(where, row) of a split, streamed: nothing is kept on disk. Raises `DataError` when the hub does not give it."""
    try:
        from datasets import load_dataset
        from datasets.utils.logging import disable_progress_bar, set_verbosity_error
    except ModuleNotFoundError:
        raise ConfigError("Data sets of the hub need the package datasets: pip install 'ftcore[hub]'.") from None
    from huggingface_hub import HfApi

    disable_progress_bar(), set_verbosity_error()
    place = f"{hub['name']}/{split}"
    try:
        # Asked once and shortly whether it is there: the reader itself would try for most of a minute.
        commit = HfApi().dataset_info(hub["name"], revision=hub["revision"], timeout=5).sha
        rows = load_dataset(hub["name"], hub["config"], split=split, revision=commit, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{place}:{number}", dict(row)
    except Exception as error:  # of several libraries, the network's among them
        said = "" if is_private() else str(error)  # a cell that does not fit its column is quoted
        reason = (said.splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise DataError(
            f"{place} (revision {hub['revision']}) cannot be read from the Hugging Face hub: {reason}. Check the name and the "
            "network, set HF_TOKEN for a private one, or give a local copy with data.path=<file>."
        ) from None


def files_of(path: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files, sorted by name.

    A folder means all files below it that can be read, hidden ones left out; * ? and [ ] in a name make it a pattern.
    """
    found = Path(resolve(path))
    if found.is_file():
        return found.parent, [found]
    if found.is_dir():
        files = sorted(file for file in found.rglob("*") if _readable(file.relative_to(found)) and file.is_file())
        if not files:
            raise DataError(f"{found} holds no file that can be read ({', '.join(READERS)}, also .gz or .zst).")
        return found, files
    if glob.has_magic(str(found)):
        files = sorted(file for name in glob.glob(str(found), recursive=True) if (file := Path(name)).is_file())
        if files:
            fixed = found.parts[: next(k for k, part in enumerate(found.parts) if glob.has_magic(part))]
            return Path(*fixed) if fixed else Path(), files
        raise DataError(f"No file matches {found.absolute()} (working directory: {Path.cwd()}).")
    raise DataError(f"There is no file {found.absolute()} (working directory: {Path.cwd()}).")


def split_files(path: str) -> dict[Split, str | None]:
    """The files of a folder that are named for the splits, as train.jsonl; {} unless train and another one are there."""
    folder = Path(resolve(path))
    found: dict[Split, str | None] = {
        part: next((str(file) for file in sorted(folder.glob(f"{part}.*")) if _readable(Path(file.name))), None)
        for part in SPLITS
    }
    return found if found["train"] and (found["validation"] or found["test"]) else {}


def _readable(file: Path) -> bool:
    if any(part.startswith(".") for part in file.parts):
        return False
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix not in COMPRESSED]
    return bool(suffixes) and suffixes[-1] in READERS
