"""Files to rows, read strictly: a row is right or refused with file, line and reason. Messages never hold row content."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftcore.errors import DataError
from ftcore.resources import resolve

Row = dict[str, Any]


def read_jsonl(path: str) -> Iterator[tuple[int, Row]]:
    """(line number, object) of every line that is not blank. A byte-order mark and CRLF are accepted.

    Raises `DataError` for a missing or empty file, bytes that are not UTF-8, a line that is not one JSON object, NUL
    characters and lone surrogates.
    """
    file = Path(resolve(path))
    if not file.is_file():
        raise DataError(f"There is no file {file} (working directory: {Path.cwd()}).")
    empty = True
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = _decode(line, f"{file}:{number}", first=number == 1)
            if text.strip():
                empty = False
                yield number, _parse(text, f"{file}:{number}", ended=line.endswith(b"\n"))
    if empty:
        raise DataError(f"{file} has 0 rows.")


def _decode(line: bytes, where: str, *, first: bool) -> str:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} is not UTF-8. Save the file as UTF-8.") from None
    if "\x00" in text or "\\u0000" in text:
        raise DataError(f"{where}: holds a NUL character. Remove it: tokenizers treat it differently.")
    return text


def _parse(text: str, where: str, *, ended: bool) -> Row:
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        cut = "" if ended else " The file ends without a line break: it may be incomplete."
        raise DataError(f"{where}, column {error.colno}: not valid JSON: {error.msg}.{cut}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}.") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a line must hold a JSON object, not {_json_type(row)}.")
    if "\\ud" in text.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: holds half of a surrogate pair (\\ud...): not a character.") from None
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _json_type(value: object) -> str:
    names = {list: "an array", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
