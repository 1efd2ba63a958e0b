"""The rows of one file, read strictly: a row is right, or an error names file, line and reason, never what the row holds.

The ending of the name says the format: .jsonl, .json, .csv, .tsv, .parquet, .txt or .md, each also as .gz or .zst. A reader
yields (line, row), or (line, `DataError`) for a row that may be skipped. It raises what makes the rest of a file unreadable.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

import orjson

from ftcore.data.json_array import STRICT, JsonArray
from ftcore.errors import DataError
from ftcore.files import HEAD, placeholder

Row = dict[str, Any]
Rows = Iterator[tuple[int | str, Row | DataError]]
# A key and its colon with something between them.
APART = re.compile(rb'"\s+:')
# First bytes -> the ending of such a file.
ARCHIVES = {
    b"PK\x03\x04": ".zip", b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet", b"BZh": ".bz2",
    b"\xfd7zXZ": ".xz", b"%PDF": ".pdf", b"Rar!": ".rar", b"7z\xbc\xaf": ".7z",
}  # fmt: skip


def read_file(file: Path, longest: int = 64) -> Rows:
    """Rows of a file with their line numbers (Parquet: row numbers). `longest`: MB that a line, or a text, may have.

    Raises `DataError` when the rest cannot be read, or the file is not what its name says.
    """
    reader = READERS.get(format_of(file))
    if reader is None:
        raise DataError(f"{file}: the ending says no format that can be read: {', '.join(READERS)}, also .gz or .zst.")
    check_content(file, packed=file.suffix in (".gz", ".zst"))
    try:
        with _opened(file) as stream:
            if stands_for := placeholder(stream.peek(HEAD)):
                raise DataError(f"{file} holds {stands_for}.")
            yield from reader(stream, str(file), longest * 2**20)
    except DataError:
        raise
    except Exception as error:  # of several libraries, over the bytes of a stranger
        if isinstance(error, OSError) and file.suffix not in (".gz", ".zst"):
            raise  # of the disk, which explains itself
        verb = "unpacked" if file.suffix in (".gz", ".zst") else "read"
        raise DataError(
            f"{file} cannot be {verb}: {type(error).__name__}. The file may be incomplete or damaged."
        ) from None


def check_content(file: Path, *, packed: bool = False) -> None:
    """Raise `DataError` for a file that stands for another one, or is of another kind than its name says."""
    with file.open("rb") as stream:
        head = stream.read(HEAD)
    if stands_for := placeholder(head):
        raise DataError(f"{file} is {stands_for}.")
    wide = len(head) > 3 and any(head) and not (any(head[1::2]) and any(head[::2]))
    if wide or head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        raise DataError(f"{file} is UTF-16 or UTF-32. Save the file as UTF-8.")
    found = next((kind for magic, kind in ARCHIVES.items() if head.startswith(magic)), None)
    if found and not packed and found != format_of(file):
        raise DataError(f"{file} is a {found} file by its first bytes, not what its ending says. Rename or unpack it.")


def format_of(file: Path) -> str:
    """The ending that says the format: ".csv" of "rows.CSV.gz"."""
    return Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix.lower()


def _opened(file: Path) -> Any:  # binary files that can peek
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    if file.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(str(file), "zstd"))  # type: ignore[arg-type]
    return file.open("rb")


def _lines(stream: io.BufferedIOBase, where: str, longest: int) -> Iterator[bytes]:
    for number, line in enumerate(iter(partial(stream.readline, longest + 1), b""), 1):
        if len(line) > longest:
            raise DataError(
                f"{where}:{number}: the line has more than {longest // 2**20} MB. Raise data.max_line_mb if it is right."
            )
        yield line


def _jsonl(stream: io.BufferedIOBase, where: str, longest: int) -> Rows:
    """One object a line. A byte-order mark, CRLF and blank lines are accepted."""
    for number, line in enumerate(_lines(stream, where, longest), 1):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            row = None
        # As many names as keys: no name is there twice. A closer look takes five times as long.
        names = line.count(b'":')
        if type(row) is dict and (names == len(row) or names == _keys(row)) and not _is_apart(line):
            yield number, row
        elif unusual := _unusual(line, f"{where}:{number}", first=number == 1):
            yield number, unusual


def _is_apart(line: bytes) -> bool:
    """Whether something stands between a key and its colon, or seems to; the search alone would take longer than reading."""
    return (b'" ' in line or b'"\t' in line or b'"\r' in line) and APART.search(line) is not None


def _keys(value: object) -> int:
    """Number of keys in a JSON value, nested ones too."""
    if type(value) is dict:
        return len(value) + sum(_keys(inner) for inner in value.values() if type(inner) in (dict, list))
    return sum(map(_keys, value)) if type(value) is list else 0


def _unusual(line: bytes, where: str, *, first: bool) -> Row | DataError | None:
    """The row of a line that needs a closer look, or what is wrong with it; None when it is blank."""
    try:
        text = _decode(line, where, first=first)
        return _object(json.loads(text, **STRICT), where) if text.strip() else None
    except DataError as error:
        return error
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else " The file ends without a line break: it may be incomplete."
        return DataError(f"{where}, column {error.colno}: not valid JSON: {error.msg}.{cut}")
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: not valid JSON: {error}.")


def _decode(line: bytes, where: str, *, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} is not UTF-8. Save the file as UTF-8.") from None


def _decode_all(content: bytes, where: str) -> str:
    """A whole file as text; an error names the line."""
    lines = (_decode(line, f"{where}:{k}", first=k == 1) for k, line in enumerate(content.splitlines(keepends=True), 1))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "".join(lines)


def _object(row: object, where: str) -> Row | DataError:
    if not isinstance(row, dict):
        kind = {list: "an array", str: "text", bool: "true or false", type(None): "null"}.get(type(row), "a number")
        return DataError(f"{where}: a row must be a JSON object, not {kind}.")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return DataError(f"{where}: holds half of a surrogate pair (\\ud...): not a character.")
    return row


def _json(stream: Any, where: str, longest: int) -> Rows:
    """One array of objects. A file that begins with an object is read as JSON lines."""
    if stream.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        yield from _jsonl(stream, where, longest)
        return
    for place, item in JsonArray(stream, where, longest).items():
        yield place, _object(item, f"{where}:{place}")


def _csv(stream: io.BufferedIOBase, where: str, longest: int, delimiter: str = ",") -> Rows:
    """A header with the columns, then one row a record; quoted fields may hold line breaks. Every cell is text.

    Spreadsheets separate by semicolons or tabs where a comma is part of numbers, or say how in a first line `sep=;`. pandas
    writes a column without a name: its cells have the name "".
    """
    csv.field_size_limit(10_000_000)  # a longer field means a quote that was never closed
    raw = _lines(stream, where, longest)
    lines: Iterator[str] = (_decode(line, f"{where}:{number}", first=number == 1) for number, line in enumerate(raw, 1))
    first = next(lines, "")
    if said := re.fullmatch(r"sep=(.)\s*", first):
        delimiter, before = said[1], 1
    else:
        lines, before = chain([first], lines), 0
        if delimiter not in first:
            delimiter = next((other for other in ";\t" if other in first), delimiter)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(filter(None, header))) < sum(map(bool, header)):
            raise DataError(f"{where}:1: the header names a column twice.")
        for cells in reader:
            number = reader.line_num + before
            if cells and len(cells) != len(header):
                yield number, DataError(f"{where}:{number}: {len(cells)} fields, and the header has {len(header)}.")
            elif cells:
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{where}:{reader.line_num + before}: not valid CSV: {error}. Is a quote left open?") from None


def _parquet(stream: io.BufferedIOBase, where: str, longest: int) -> Rows:
    """Rows of a Parquet file; a batch of them is in memory at a time."""
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(stream)
        if len({*(names := file.schema_arrow.names)}) < len(names):
            raise DataError(f"{where}: a column is there twice.")
        batches = file.iter_batches(1000)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield number, row if _is_finite(row) else DataError(f"{where}:{number}: a number is not finite.")
    except ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{where} cannot be read as Parquet: {reason} The file may be incomplete.") from None


def _is_finite(value: object) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or isfinite(value)


def _text(stream: io.BufferedIOBase, where: str, longest: int) -> Rows:
    """The whole file as one document."""
    content = stream.read(longest + 1)
    if len(content) > longest:
        raise DataError(f"{where} has more than {longest // 2**20} MB. Raise data.max_line_mb if it is right.")
    text = _decode_all(content, where)
    if text.strip():
        yield 1, {"text": text}


READERS: dict[str, Callable[[io.BufferedIOBase, str, int], Rows]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet, ".txt": _text, ".md": _text,
}  # fmt: skip
