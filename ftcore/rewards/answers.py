"""What counts as a right answer: accepted texts of a row, and what an answer holds: words, a letter, a number."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

# A completion longer than this is no short answer, and finding it word by word in a generation says nothing.
SHORT_ANSWER_WORDS = 8
# A lone letter that is called the answer, else opens the text, else is the last one in it. "I" is mostly a word.
CHOICES = (
    r"(?i:\banswer(?:\W+is)?|\boption|\bchoice)\W+(?!I\W+[a-z])([A-Z]\b|[a-z](?=\W*$))",
    r"^\W*([A-Za-z])(?=\W*$|\)|[.:]\s)",
    r"\b([A-HJ-Z])\b",
)
NUMBER = r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\d))?"


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an answer holds one of the accepted strings as whole words; case and punctuation do not count.

    >>> is_right("You need an X-ray.", ["x ray"]), is_right("Sixteen", ["six"])
    (True, False)
    """
    return any(f" {normalised(entry)} " in f" {normalised(answer)} " for entry in accepted)


def accepted_answers(row: dict[str, Any]) -> list[str] | None:
    """What counts as right: the row's `answer`, else its completion when that is short, else None."""
    answer = row.get("answer")
    if answer:
        return [answer] if isinstance(answer, str) else [str(entry) for entry in answer]
    completion = row.get("completion")
    if isinstance(completion, str) and 0 < len(completion.split()) <= SHORT_ANSWER_WORDS:
        return [completion]
    return None


def normalised(text: str) -> str:
    """Lower-case words and numbers, one space between them; the text itself when it has none.

    >>> normalised("An X-ray,  please!"), normalised(" + ")
    ('an x ray please', '+')
    """
    return " ".join(re.findall(r"\w+", text.lower())) or text.strip()


def choice(text: str) -> str | None:
    """The letter that an answer to a multiple-choice question gives.

    >>> choice("(b)"), choice("A. is wrong, so the answer is C."), choice("I do not know.")
    ('B', 'C', None)
    """
    letters = (found[-1] for pattern in CHOICES if (found := re.findall(pattern, text)))
    return next(letters, "").upper() or None


def last_number(text: str) -> Decimal | None:
    """The last number of a text; after the last `####` where there is one, as in GSM8K.

    >>> last_number("10-4 = 6, so -1,234.50 euros."), last_number("none")
    (Decimal('-1234.50'), None)
    """
    numbers = re.findall(NUMBER, text.rpartition("####")[2].replace("\N{MINUS SIGN}", "-"))
    return Decimal(numbers[-1].replace(",", "")) if numbers else None
