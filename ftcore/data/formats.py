"""The rows of one file, read strictly: a row is right, or an error names file, line and reason, never what the row holds.

The ending of the name says the format: .jsonl, .json, .csv, .tsv, .parquet, .txt or .md, each also as .gz or .zst. A reader
yields (line, row), or (line, `DataError`) for a row that may be skipped. It raises what makes the rest of a file unreadable.
"""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from ftcore.errors import DataError

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row | DataError]]


def read_file(file: Path) -> Rows:
    """Rows of a file with their line numbers (Parquet: row numbers). Raises `DataError` when the rest cannot be read."""
    reader = READERS.get(format_of(file))
    if reader is None:
        raise DataError(f"{file}: the ending says no format that can be read: {', '.join(READERS)}, also .gz or .zst.")
    try:
        with _opened(file) as stream:
            yield from reader(stream, str(file))
    except (EOFError, OSError) as error:  # of a broken archive; other errors of the disk explain themselves
        if file.suffix not in (".gz", ".zst"):
            raise
        raise DataError(f"{file} cannot be unpacked: {error}. The file may be incomplete.") from None


def format_of(file: Path) -> str:
    """The ending that says the format: ".csv" of "rows.CSV.gz"."""
    return Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix.lower()


def _opened(file: Path) -> io.BufferedIOBase:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    if file.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(str(file), "zstd"))  # type: ignore[arg-type]
    return file.open("rb")


def _jsonl(stream: io.BufferedIOBase, where: str) -> Rows:
    """One object a line. A byte-order mark, CRLF and blank lines are accepted."""
    for number, line in enumerate(stream, 1):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            row = None
        if type(row) is dict:
            yield number, row
        elif unusual := _unusual(line, f"{where}:{number}", first=number == 1):
            yield number, unusual


def _unusual(line: bytes, where: str, *, first: bool) -> Row | DataError | None:
    """The row of a line that is no plain JSON object, or what is wrong with it; None when it is blank."""
    try:
        text = _decode(line, where, first=first)
        return _object(json.loads(text, parse_constant=_refuse_constant), where) if text.strip() else None
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


def _object(row: object, where: str) -> Row | DataError:
    if not isinstance(row, dict):
        kind = {list: "an array", str: "text", bool: "true or false", type(None): "null"}.get(type(row), "a number")
        return DataError(f"{where}: a row must be a JSON object, not {kind}.")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return DataError(f"{where}: holds half of a surrogate pair (\\ud...): not a character.")
    return row


def _json(stream: io.BufferedIOBase, where: str) -> Rows:
    """One array of objects. A file that begins with an object is read as JSON lines."""
    content = stream.read()
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        yield from _jsonl(io.BytesIO(content), where)
        return
    text = _decode(content, where, first=True)
    decoder, at = json.JSONDecoder(parse_constant=_refuse_constant), _after(text, 0, " \t\r\n")
    if text[at : at + 1] != "[":
        raise DataError(f"{where} must hold an array of objects, or one object a line.")
    at, line, counted = _after(text, at + 1, " \t\r\n"), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{where}:{line}: not valid JSON: {reason}. The file may be incomplete.") from None
        yield line, _object(row, f"{where}:{line}")
        at = _after(text, at, " \t\r\n,")


def _after(text: str, at: int, skipped: str) -> int:
    while at < len(text) and text[at] in skipped:
        at += 1
    return at


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _csv(stream: io.BufferedIOBase, where: str, delimiter: str = ",") -> Rows:
    """A header with the columns, then one row a record; quoted fields may hold line breaks. Every cell is text."""
    csv.field_size_limit(10_000_000)  # a longer field means a quote that was never closed
    lines = (_decode(line, f"{where}:{number}", first=number == 1) for number, line in enumerate(stream, 1))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or not all(header):
            raise DataError(f"{where}:1: the header must name every column, each once.")
        for cells in reader:
            number = reader.line_num
            if cells and len(cells) != len(header):
                yield number, DataError(f"{where}:{number}: {len(cells)} fields, and the header has {len(header)}.")
            elif cells:
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{where}:{reader.line_num}: not valid CSV: {error}. Is a quote left open?") from None


def _parquet(stream: io.BufferedIOBase, where: str) -> Rows:
    """Rows of a Parquet file; a batch of them is in memory at a time."""
    from pyarrow import ArrowException, parquet

    try:
        batches = parquet.ParquetFile(stream).iter_batches(1000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{where} cannot be read as Parquet: {reason} The file may be incomplete.") from None


def _text(stream: io.BufferedIOBase, where: str) -> Rows:
    """The whole file as one document."""
    text = _decode(stream.read(), where, first=True)
    if text.strip():
        yield 1, {"text": text}


READERS: dict[str, Callable[[io.BufferedIOBase, str], Rows]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": lambda stream, where: _csv(stream, where, "\t"),
    ".parquet": _parquet, ".txt": _text, ".md": _text,
}  # fmt: skip
