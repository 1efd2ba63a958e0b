"""Where rows come from: a file, a folder, a pattern of names, or a data set of the Hugging Face hub."""

import glob
import os
import re
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
# A file, a folder, or a pattern; or a folder and some of its files.
Paths = str | tuple[str, ...]
# Words that name a split in the names of files and folders, as on the Hugging Face hub.
WORDS_OF: dict[Split, set[str]] = {
    "train": {"train", "training"}, "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}  # fmt: skip
# What says something about a data set and holds none of its rows.
DESCRIPTIONS = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "datapackage.json",
    "croissant.json",
}
DOCUMENTS = (".txt", ".md")


class Hub(TypedDict):
    """A data set of the Hugging Face hub: name, configuration and revision, and which of its splits and columns are ours."""

    name: str
    config: str | None
    revision: str
    splits: dict[Split, str | None]
    columns: dict[str, str]
    values: dict[str, dict[str, str]]


def read_rows(path: Paths, longest: int = 64) -> Iterator[tuple[str, Row | DataError]]:
    """(where, row) of all files of a path; instead of a wrong row its error. `where` is file:line. `longest`: MB of a line.

    Raises `DataError` when there is no file or no row, or when the rest of a file cannot be read.
    """
    root, files = files_of(path)
    # A name may hold bytes that are no text, which no results could be written with.
    names = {file: os.fsencode(file.relative_to(root)).decode(errors="replace") for file in files}
    rows = ((f"{names[file]}:{line}", row) for file in files for line, row in read_file(file, longest))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{files[0] if len(files) == 1 else root} has 0 rows.")
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


def files_of(path: Paths) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files, sorted by name. Raises `DataError` when there is none.

    A folder stands for all files below it that can be read, without hidden ones. * ? and [ ] make a name a pattern.
    """
    if not isinstance(path, str):
        return Path(path[0]), [Path(file) for file in path[1:]]
    root = Path(resolve(path))
    if root.is_file():
        return root.parent, [root]
    check_link(root)
    if root.is_dir():
        files = rows_below(root)
        if not files:
            raise DataError(f"{root} holds no file that can be read ({', '.join(READERS)}, also .gz or .zst).")
        for file in files:
            check_link(file)
        return root, files
    files = sorted(file for name in glob.glob(str(root), recursive=True) if (file := Path(name)).is_file())
    if not files:
        raise DataError(f"There is no file {root.absolute()} (working directory: {Path.cwd()}).")
    return Path(*takewhile(lambda part: not glob.has_magic(part), root.parts)), files


def check_link(file: Path) -> None:
    """Raise `DataError` for a link to what is not here."""
    if file.is_symlink() and not file.exists():
        raise DataError(f"{file} is a link to a file that is not here. If it is git-annex's: git annex get.")


def split_files(path: str) -> dict[Split, Paths | None]:
    """The files of a folder or pattern by the split that their names say, as train-00000.parquet or test/a.jsonl.

    {} unless some are held out and others train. Where none is named for training, those of no split are.
    """
    if not is_many(path):
        return {}
    root, files = files_of(path)
    named: dict[Split | None, list[str]] = {None: [], "train": [], "validation": [], "test": []}
    for file in files:
        named[_split_of(file.relative_to(root))].append(str(file))
    train = named["train"] or named[None]
    if not train or not (named["validation"] or named["test"]):
        return {}
    found = {"train": train, "validation": named["validation"], "test": named["test"]}
    return {split: (str(root), *found[split]) if found[split] else None for split in SPLITS}


def is_many(path: str) -> bool:
    """Whether a path stands for several files: a folder or a pattern."""
    root = Path(resolve(path))
    return root.is_dir() or (not root.is_file() and glob.has_magic(str(root)))


def held_out_by_name(path: str) -> list[str]:
    """The names of all files of a folder or pattern if each says that its rows are held out, else none."""
    if not is_many(path):
        return []
    root, files = files_of(path)
    names = [file.relative_to(root) for file in files]
    return (
        [name.as_posix() for name in names] if all(_split_of(name) in ("validation", "test") for name in names) else []
    )


def left_out(path: Paths, used: list[Paths]) -> list[str]:
    """Files of a folder that are not among the `used` ones, those that hold no rows among them."""
    root = Path(resolve(path if isinstance(path, str) else path[0]))
    if not root.is_dir():
        return []
    read = {file for one in used for file in files_of(one)[1]}
    files = (file for file in root.rglob("*") if not file.is_dir())
    return sorted(name for file in files if file not in read and (name := file.relative_to(root).as_posix())[0] != ".")


def rows_below(root: Path) -> list[Path]:
    """Files of rows in a folder, sorted: hidden ones, cards and licences beside them, and descriptions of data sets are none."""
    files = sorted(file for file in root.rglob("*") if _readable(file.relative_to(root)) and not file.is_dir())
    files = [file for file in files if file.name not in DESCRIPTIONS]
    tables = [file for file in files if format_of(file) not in DOCUMENTS]
    return tables or [file for file in files if file.stem.upper() not in ("README", "LICENSE", "LICENCE", "NOTICE")]


def _split_of(file: Path) -> Split | None:
    """The split that a file's name says, or else the nearest folder's."""
    for part in (file.name, *reversed(file.parent.parts)):
        words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part)]
        words += [word.removesuffix("set").removesuffix("data") for word in words]
        if found := [split for split in SPLITS if not WORDS_OF[split].isdisjoint(words)]:
            return found[0]
    return None


def _readable(file: Path) -> bool:
    return format_of(file) in READERS and not any(part.startswith(".") for part in file.parts)
