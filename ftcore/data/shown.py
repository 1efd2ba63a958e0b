"""Rows as the model reads them, for people: text of token ids, and which of it carries loss."""

from collections.abc import Iterable
from typing import NamedTuple, TypedDict

from transformers import PreTrainedTokenizerBase

from ftcore.data.examples import Example, Pair, Prompt
from ftcore.errors import is_private

TOKENS = 300  # that are shown of a row


class Part(NamedTuple):
    """Neighbouring tokens as text; all of them carry loss, or none."""

    text: str
    trained: bool


class Shown(TypedDict):
    """A sequence of a row as the model reads it: the row's id, the side's name, and its parts (none where rows are private)."""

    id: str
    side: str
    parts: list[Part]


def sides(row: Example | Pair | Prompt) -> list[tuple[str, Example | Prompt]]:
    """What a row consists of: (name, sequence); the name is "" where there is one."""
    return [("chosen", row.chosen), ("rejected", row.rejected)] if isinstance(row, Pair) else [("", row)]


def parts(tokenizer: PreTrainedTokenizerBase, side: Example | Prompt) -> list[Part]:
    """The beginning of a row, and the tokens around the first with loss where that comes later."""
    mask = side.completion_mask if isinstance(side, Example) else [False] * len(side)
    first, half = mask.index(True) if any(mask) else 0, TOKENS // 2
    stretches = [(0, TOKENS)] if first < half else [(0, half // 2), (first - half // 2, first + half)]
    found: list[Part] = []
    for begin, end in stretches:
        found += [Part(" ... ", False)] if begin else []
        start = begin
        for k in range(begin + 1, min(end, len(side)) + 1):  # together: one token alone may be half a character
            if k == min(end, len(side)) or mask[k] != mask[start]:
                found.append(Part(str(tokenizer.decode(side.input_ids[start:k])), mask[start]))
                start = k
    return [*found, Part(" ...", False)] if len(side) > stretches[-1][1] else found


def as_read(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Example | Pair | Prompt]) -> list[Shown]:
    """Rows as the model reads them."""
    found = [one for row in rows for one in sides(row)]
    return [Shown(id=one.id, side=name, parts=[] if is_private() else parts(tokenizer, one)) for name, one in found]
