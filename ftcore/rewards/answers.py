"""Which answers are right: the accepted answers of a row, and the words, letter or number that a text gives."""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

# A longer completion is no short answer: whether a generated text repeats it word by word says nothing.
SHORT_ANSWER_WORDS = 8
# A lone letter that the text calls its answer, else begins with, else ends with. "I" is mostly a word.
LETTERS = (
    r"(?i:\banswer(?:\W+is)?|\boption|\bchoice)\W+(?!I\W+[a-z])([A-Z]\b|[a-z](?=\W*$))",
    r"^\W*([A-Za-z])(?=\W*$|\)|[.:]\s)",
    r"\b([A-HJ-Z])\b",
)
NUMBER = r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\d))?"


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an answer contains one of the accepted strings as whole words, ignoring case and punctuation.

    >>> is_right("You need an X-ray.", ["x ray"]), is_right("Sixteen", ["six"])
    (True, False)
    """
    return any(f" {normalised(entry)} " in f" {normalised(answer)} " for entry in accepted)


def accepted_answers(row: Mapping[str, Any]) -> list[str]:
    """The row's `answer`, one or several, else its completion if that is short, else none."""
    if answer := row.get("answer"):
        return [answer] if isinstance(answer, str) else [str(entry) for entry in answer]
    completion = row.get("completion")
    return [completion] if isinstance(completion, str) and 0 < len(completion.split()) <= SHORT_ANSWER_WORDS else []


def normalised(text: str) -> str:
    """Lower-case words and numbers with one space between them; the text itself if it has none.

    >>> normalised("An X-ray,  please!"), normalised(" + ")
    ('an x ray please', '+')
    """
    return " ".join(re.findall(r"\w+", text.lower())) or text.strip()


def letter(text: str) -> str | None:
    """The letter that a text gives as its answer to a multiple-choice question.

    >>> letter("(b)"), letter("A. is wrong, so the answer is C."), letter("I do not know.")
    ('B', 'C', None)
    """
    last = (letters[-1] for pattern in LETTERS if (letters := re.findall(pattern, text)))
    return next(last, "").upper() or None


def last_number(text: str) -> Decimal | None:
    """The last number of a text; if it has `####`, as in GSM8K, the last number after that.

    >>> last_number("10-4 = 6, so -1,234.50 euros."), last_number("none")
    (Decimal('-1234.50'), None)
    """
    numbers = re.findall(NUMBER, text.rpartition("####")[2].replace("\N{MINUS SIGN}", "-"))
    return Decimal(numbers[-1].replace(",", "")) if numbers else None
