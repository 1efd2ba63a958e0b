"""A JSON array of any length, read item by item in the memory of one of them, strictly and with the line of each."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from itertools import count
from math import isfinite
from typing import Any

from ftcore.errors import DataError

CHUNK = 2**20  # bytes that are read at once, or as many as an item has so far
NOT_SPACE = re.compile(r"[^ \t\r\n]")
# The longest of what JSON's parser takes whole, such as -Infinity or an escaped character: it fails before the text's end.
LONGEST_WORD = 16


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _finite(digits: str) -> float:
    if not isfinite(number := float(digits)):
        raise ValueError("a number is too large")
    return number


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice in one object")
    return row


# Arguments of Python's parser with which it takes what JSON has, and nothing twice.
STRICT: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite, "object_pairs_hook": _once}


class JsonArray:
    """The array that a stream holds. `where` is the file, for messages; `longest` is how many bytes an item may have."""

    def __init__(self, stream: io.BufferedIOBase, where: str, longest: int) -> None:
        self.stream, self.where, self.longest = stream, where, longest
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.parse = json.JSONDecoder(**STRICT).raw_decode
        self.text, self.at = "", 0  # what is in memory, and how far it is read
        self.line, self.counted = 1, 0  # the line of character `counted`

    def items(self) -> Iterator[tuple[str, object]]:
        """(place, item): its line, and its number where that line has an earlier one. Raises `DataError` for what is no JSON."""
        if self._next() != "[":
            raise DataError(f"{self.where} must hold an array of objects, or one object a line.")
        self.at, before = self.at + 1, 0
        for number in count(1):
            if self._next() == "]":
                break
            line = self._line()
            place, before = f"{line}, item {number}" if line == before else str(line), line
            yield place, self._item()
            if (following := self._next()) == ",":
                self.at += 1
            elif following != "]":
                raise self._wrong("not valid JSON: no comma after this value, or the file ends.")
        self.at += 1
        if self._next():
            raise self._wrong("something follows the array. Make one array of it, or one object a line (.jsonl).")

    def _item(self) -> object:
        line = self._line()
        while True:
            try:
                item, self.at = self.parse(self.text, self.at)
                return item
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                if len(self.text) - self.at > self.longest:
                    reason = (
                        f"the item has more than {self.longest // 2**20} MB; raise data.max_line_mb if that is right"
                    )
                elif self._is_cut(error) and self._read_on():
                    continue
            raise DataError(f"{self.where}:{line}: not valid JSON: {reason}. The file may be incomplete.")

    def _is_cut(self, error: Exception) -> bool:
        """Whether the text may have ended too early, rather than hold something wrong."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated") or error.pos > len(self.text) - LONGEST_WORD

    def _next(self) -> str:
        """The next character that is no space, to which it goes; "" at the end."""
        while not (found := NOT_SPACE.search(self.text, self.at)):
            self.at = len(self.text)
            if not self._read_on():
                return ""
        self.at = found.start()
        return found[0]

    def _read_on(self) -> bool:
        """More text behind what is not read yet; False at the end of the file."""
        self._line()
        rest = self.text[self.at :]
        content = self.stream.read(max(CHUNK, len(rest)))
        try:
            self.text, self.at, self.counted = rest + self.decode(content, final=not content), 0, 0
        except UnicodeDecodeError as error:
            line = self.line + rest.count("\n") + error.object.count(b"\n", 0, error.start)
            raise DataError(f"{self.where}:{line}: a byte is not UTF-8. Save the file as UTF-8.") from None
        return bool(content)

    def _line(self) -> int:
        """The line of where it stands."""
        self.line, self.counted = self.line + self.text.count("\n", self.counted, self.at), self.at
        return self.line

    def _wrong(self, reason: str) -> DataError:
        return DataError(f"{self.where}:{self._line()}: {reason}")
