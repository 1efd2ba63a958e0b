"""Where rows come from: a file, a folder, a pattern of names, or a data set of the Hugging Face hub."""

import glob
from collections.abc import Iterator
from itertools import chain, takewhile
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from ftcore.data.formats import READERS, Row, format_of, read_file
from ftcore.errors import ConfigError, DataError, is_private
from ftcore.files import resolve

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Hub(TypedDict):
    """A data set of the Hugging Face hub: name, configuration and revision, and which of its splits and columns are ours."""

    name: str
    config: str | None
    revision: str
    splits: dict[Split, str | None]
    columns: dict[str, str]
    values: dict[str, dict[str, str]]


def read_rows(path: str) -> Iterator[tuple[str, Row | DataError]]:
    """(where, row) of all files of a path; instead of a wrong row its error. `where` is file:line.

    Raises `DataError` when there is no file or no row, or when the rest of a file cannot be read.
    """
    root, files = files_of(path)
    names = {file: file.relative_to(root).as_posix() for file in files}
    rows = ((f"{names[file]}:{line}", row) for file in files for line, row in read_file(file))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{files[0] if len(files) == 1 else path} has 0 rows.")
    yield from chain([first], rows)


def rows_of(path: str) -> Iterator[tuple[str, Row]]:
    """`read_rows`, but the error of the first wrong row is raised."""
    for where, row in read_rows(path):
        if isinstance(row, DataError):
            raise row
        yield where, row


def read_hub(hub: Hub, split: str) -> Iterator[tuple[str, Row | DataError]]:
    """(where, row) of a split, streamed: nothing is kept on disk. Raises `DataError` when it cannot be read."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise ConfigError("Data sets of the hub need the package datasets: pip install 'ftcore[hub]'.") from None
    from huggingface_hub import HfApi

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    place = f"{hub['name']}/{split}"
    try:
        # Asking first fails fast: without the network the reader itself would try for most of a minute.
        commit = HfApi().dataset_info(hub["name"], revision=hub["revision"], timeout=5).sha
        rows = datasets.load_dataset(hub["name"], hub["config"], split=split, revision=commit, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{place}:{number}", dict(row)
    except Exception as error:  # of several libraries, the network's among them
        message = "" if is_private() else str(error)  # it quotes a cell that does not fit its column
        reason = (message.splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise DataError(
            f"{place} (revision {hub['revision']}) cannot be read from the Hugging Face hub: {reason}. Check the name and the "
            "network, set HF_TOKEN for a private one, or give a local copy with data.path=<file>."
        ) from None


def files_of(path: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files, sorted by name. Raises `DataError` when there is none.

    A folder stands for all files below it that can be read, without hidden ones. * ? and [ ] make a name a pattern.
    """
    root = Path(resolve(path))
    if root.is_file():
        return root.parent, [root]
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if _readable(file.relative_to(root)) and file.is_file())
        if not files:
            raise DataError(f"{root} holds no file that can be read ({', '.join(READERS)}, also .gz or .zst).")
        return root, files
    files = sorted(file for name in glob.glob(str(root), recursive=True) if (file := Path(name)).is_file())
    if not files:
        raise DataError(f"There is no file {root.absolute()} (working directory: {Path.cwd()}).")
    return Path(*takewhile(lambda part: not glob.has_magic(part), root.parts)), files


def split_files(path: str) -> dict[Split, str | None]:
    """The files of a folder that are named for the splits, as train.jsonl; {} unless train and another one are there."""
    folder = Path(resolve(path))
    found = {split: sorted(f for f in folder.glob(f"{split}.*") if format_of(f) in READERS) for split in SPLITS}
    files = {split: str(named[0]) if named else None for split, named in found.items()}
    return files if files["train"] and (files["validation"] or files["test"]) else {}


def _readable(file: Path) -> bool:
    return format_of(file) in READERS and not any(part.startswith(".") for part in file.parts)
