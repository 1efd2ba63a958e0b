"""Which rows train and which are held out, and which are the same on both sides.

Texts are compared normalised: words without case, in one spelling of Unicode, one space between them.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from unicodedata import category, normalize

from ftcore.data.formats import Row

# A table for ASCII that keeps digits and _, makes letters lower-case and all else a space.
ASCII_WORDS = bytes(ord(c.lower()) if re.match(r"\w", c) else 32 for c in map(chr, range(128))) + bytes(128)
# Signs that make another question: of arithmetic anywhere (x+1, p<0.05, a!=b); those that also are punctuation between digits
# (7/3), alone (7 - 3), before a number (-5) or after a name (C#, A-); the ticks of a derivative (f'(x)).
ANYWHERE, BETWEEN, ALONE = r"!=|[+=<>%^]+", r"(?<=\d)[-*/](?=\d)", r"(?<!\S)[-*/]+(?!\S)"
BEFORE, AFTER = r"(?<![\w-])-(?=\d)", r"(?<=\w)-(?![\w-])|(?<=\w)#+(?!\w)|(?<=\w)'+(?=\()"
SIGNS = "|".join([ANYWHERE, BETWEEN, ALONE, BEFORE, AFTER])
ANY_SIGN, HAS_SIGNS = re.compile(r"[-+*/=<>%^#(]"), re.compile(SIGNS)
TOKENS = re.compile(SIGNS + r"|[^\s\-+*/=<>%^#!'(]+")
# Texts that have this many words in a row in common are not alike by chance.
RUN = 13
# A held-out row is nearly the same as training rows when they have this share of its runs of words.
NEAR = 0.5
Matches = list[tuple[Row, str]]
Keys = dict[int, bytes]


def question_keys(rows: Iterable[Row]) -> Keys:
    """Identity of a row -> key of its question or text. Taking texts apart is slow, so it is done once."""
    return {id(row): question_key(row) for row in rows}


def question_key(row: Row) -> bytes:
    """The key of a row's question or text: rows with the same key ask the same."""
    return _key(_question(row))


def _question(row: Row) -> str:
    if messages := row.get("messages"):  # a conversation up to its last answer
        return "\n".join(message["content"] for message in messages[:-1])
    return row.get("prompt") or row["text"]


def split(rows: list[Row], keys: Keys, share: float, end: Callable[..., float]) -> tuple[list[Row], list[Row]]:
    """(rest, held out) by a hash of each row's `group` or normalised prompt or text: never by its place in the file.

    Equal texts stay together, and a row never changes sides when others are added. Held out is this share of the scale from 0
    to 1, at its lower (`end=min`) or upper end (`max`): at least the outermost text, as long as another is left.
    """
    if share <= 0:
        return rows, []
    positions = [_scale(_key(str(row["group"])) if row.get("group") else keys[id(row)]) for row in rows]
    chosen = {p for p in positions if (p < share if end is min else p >= 1 - share)}
    if not chosen and len(set(positions)) > 1:
        chosen = {end(positions)}
    rest = [row for row, place in zip(rows, positions, strict=True) if place not in chosen]
    return rest, [row for row, place in zip(rows, positions, strict=True) if place in chosen]


def repeated(rows: list[Row], keys: Keys, columns: tuple[str, ...]) -> Matches:
    """(row, where the first like it stands) for rows whose normalised `columns` came before."""
    counts = Counter(keys[id(row)] for row in rows)
    first, repeats = dict[bytes, Row](), []
    for row in (row for row in rows if counts[keys[id(row)]] > 1):
        key = _key(" | ".join(normalised(str(row[column])) for column in columns))
        if first.setdefault(key, row) is not row:
            repeats.append((row, first[key]["where"]))
    return repeats


def leaked(train: list[Row], held_out: list[Row], keys: Keys, columns: tuple[str, ...]) -> tuple[Matches, list[Row]]:
    """Held-out rows that training contains: (row, where) for the same question or text, and rows that are nearly the same.

    Memory grows with the held-out rows, time with both.
    """
    held = {keys[id(row)] for row in held_out}
    runs = {run for row in held_out for run in _runs(row, columns)}
    trained, first = set[int](), dict[bytes, str]()
    for row in train if held else []:
        if (key := keys[id(row)]) in held:
            first.setdefault(key, row["where"])
        trained |= runs.intersection(_runs(row, columns) if runs else ())
    same = [(row, first[key]) for row in held_out if (key := keys[id(row)]) in first]
    others = [row for row in held_out if keys[id(row)] not in first]
    hits = ((row, [run in trained for run in _runs(row, columns)]) for row in others)
    return same, [row for row, found in hits if found and sum(found) >= NEAR * len(found)]


def normalised(text: str) -> str:
    """Words in one spelling of Unicode and case, and signs that make another question; the text itself when it has none.

    >>> normalised("An X-ray,  please!"), normalised("7+3 = ?"), normalised("?!")
    ('an x ray please', '7 + 3 =', '?!')
    """
    return " ".join(_words(text)) or text


def _words(text: str) -> list[str]:
    if text.isascii() and not (ANY_SIGN.search(text) and HAS_SIGNS.search(text)):  # several times as fast
        return text.encode().translate(ASCII_WORDS).decode().split()
    folded = normalize("NFKC", normalize("NFKC", text).casefold())
    return TOKENS.findall(folded.translate(_KEPT))


class _Kept(dict[int, str]):
    """What stays of a character: letters, digits and their marks, signs as words of their own; nothing of invisible ones."""

    def __missing__(self, code: int) -> str:
        character, kind = chr(code), category(chr(code))
        is_sign = character in "-+*/=<>%^#!'("
        kept = kind[0] in "LNM" or character == "_" or is_sign
        self[code] = character if kept else "" if kind == "Cf" else f" {character} " if kind[0] == "S" else " "
        return self[code]


_KEPT = _Kept()


def position(text: str) -> float:
    """A number in [0, 1) that depends on the normalised text only."""
    return _scale(_key(text))


def _scale(key: bytes) -> float:
    return int.from_bytes(key[:8]) / 2**64


def _key(text: str) -> bytes:
    return hashlib.sha256(normalised(text).encode()).digest()[:16]


def _runs(row: Row, columns: tuple[str, ...]) -> Iterator[int]:
    text = " ".join(str(row[column]) for column in columns)
    if len(text) < 2 * RUN - 1:  # too short for as many words
        return
    words = _words(text)
    yield from (hash(tuple(words[k : k + RUN])) for k in range(len(words) - RUN + 1))
