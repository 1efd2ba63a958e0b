"""Which rows train and which are held out, and what is the same on both sides.

Texts are compared normalised: lower-case words, one space between them.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator

from ftcore.data.formats import Row

WORDS = re.compile(r"\w+")
# Texts with this many words in a row in common are not alike by chance.
RUN = 13
# A held-out row is nearly the same as training rows when they hold this share of its runs.
NEAR = 0.5
Found = list[tuple[Row, str]]


def split(rows: list[Row], share: float, end: Callable[..., float]) -> tuple[list[Row], list[Row]]:
    """(rest, held out) by a hash of each row's `group` or normalised prompt or text: never by its place in the file.

    Equal texts stay together and a row never changes sides when others are added. Held out is the share of the scale at its
    lower (`end=min`) or upper end (`max`), and at least the outermost text, as long as another is left.
    """
    if share <= 0:
        return rows, []
    positions = [position(normalised(str(row.get("group") or _question(row)))) for row in rows]
    chosen = {p for p in positions if (p < share if end is min else p >= 1 - share)}
    if not chosen and len(set(positions)) > 1:
        chosen = {end(positions)}
    rest = [row for row, position in zip(rows, positions, strict=True) if position not in chosen]
    return rest, [row for row, position in zip(rows, positions, strict=True) if position in chosen]


def repeated(rows: list[Row], columns: tuple[str, ...]) -> Found:
    """(row, where its first like stands) for rows whose normalised `columns` came before."""
    keys = [_key(_question(row)) for row in rows]
    often = {key for key, count in Counter(keys).items() if count > 1}
    seen: dict[bytes, str] = {}
    found = []
    for row in (row for row, key in zip(rows, keys, strict=True) if key in often):
        key = _key(" | ".join(normalised(str(row[column])) for column in columns))
        if key in seen:
            found.append((row, seen[key]))
        seen.setdefault(key, row["where"])
    return found


def leaked(train: list[Row], held_out: list[Row], columns: tuple[str, ...]) -> tuple[Found, list[Row]]:
    """Held-out rows that training shows: (row, where) for the same question or text, and rows that are nearly the same.

    Memory grows with the held-out rows, time with both.
    """
    questions = {_key(_question(row)): row for row in held_out}
    runs = {run: False for row in held_out for run in _runs(row, columns)}
    same: dict[str, tuple[Row, str]] = {}
    for row in train if questions else []:
        if like := questions.get(_key(_question(row))):
            same.setdefault(like["where"], (like, row["where"]))
        for run in _runs(row, columns) if runs else ():
            if run in runs:
                runs[run] = True
    shares = ((row, [runs[run] for run in _runs(row, columns)]) for row in held_out if row["where"] not in same)
    return list(same.values()), [row for row, hits in shares if hits and sum(hits) >= NEAR * len(hits)]


def normalised(text: str) -> str:
    """Lower-case words; the text itself when it has none.

    >>> normalised("An X-ray,  please!"), normalised("?!")
    ('an x ray please', '?!')
    """
    return " ".join(WORDS.findall(text.lower())) or text


def position(text: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _question(row: Row) -> str:
    return str(row.get("prompt") or row["text"])


def _key(text: str) -> bytes:
    return hashlib.blake2b(normalised(text).encode(), digest_size=16).digest()


def _runs(row: Row, columns: tuple[str, ...]) -> Iterator[int]:
    text = " ".join(str(row[column]) for column in columns)
    if len(text) < 2 * RUN - 1:  # too short for as many words
        return
    words = WORDS.findall(text.lower())
    yield from (hash(tuple(words[k : k + RUN])) for k in range(len(words) - RUN + 1))
