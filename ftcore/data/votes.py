"""Votes as rows: `data=feedback` reads a store of feedback.py, or an export of it, and gives every method rows of its type."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from ftcore.data.feedback import CHOICES, LONGEST, PAIRED, Feedback, Purpose, Vote
from ftcore.data.records import Data
from ftcore.data.sources import Paths, Row, read_rows
from ftcore.errors import DataError
from ftcore.files import resolve, to_json
from ftcore.settings import Node


@dataclass(frozen=True, kw_only=True)
class FeedbackData(Data):
    """Votes that teach, as rows of any record type that is made of answers. What raters disagree on evenly is left out."""

    def read(self, path: Paths, record_type: str) -> Iterator[tuple[str, Row | DataError]]:
        """(where, row) of the votes in a store or an export; files of the other splits are read as rows."""
        if path != (self.splits["train"] or self.path) or not isinstance(path, str):
            yield from super().read(path, record_type)
            return
        file = Path(resolve(path))
        if not file.is_file():
            raise DataError(f"{file} is no file: data=feedback reads runs/feedback.db or an export of it.")
        yield from rows_of(read_votes(file), record_type, file.name)


Compared = tuple[str, str, str]  # prompt, answer, other answer or ""
# Where votes are handed on, and the held-out rows that a run on them is measured by, which lie beside them.
EXPORT, HELD_OUT = "votes.jsonl", "held_out.jsonl"
TARGET = f"{FeedbackData.__module__}.{FeedbackData.__qualname__}"


def votes_file(data: Node) -> Path | None:
    """The file of the votes that a data node reads; None for data that is not made of votes."""
    if data["_target_"] != TARGET:
        return None
    splits = cast(Mapping[str, str | None], data["splits"])
    return Path(resolve(splits["train"] or str(data["path"])))


def as_lines(file: Path) -> bytes:
    """The votes of a file as JSON lines: the file itself where it holds them so, else its export."""
    if file.suffix == ".jsonl":
        return file.read_bytes()
    return "".join(to_json(vote) + "\n" for vote in read_votes(file)).encode()


def votes_hash(file: Path) -> str:
    """SHA-256 of the votes of a file as JSON lines."""
    return hashlib.sha256(as_lines(file)).hexdigest()


def read_votes(file: Path) -> list[Vote]:
    """The votes of a store or an export. Raises `DataError` for a line that is none."""
    if not file.is_file():
        raise DataError(f"{file} is no file.")
    if file.suffix == ".db":
        return Feedback(file.parent, file.name).exported()
    votes = []
    for where, row in read_rows(str(file)):
        if isinstance(row, DataError):
            raise row
        if problem := _problem(row):
            raise DataError(f"{where}: this is no vote: {problem}.")
        votes.append(cast(Vote, {key: row[key] for key in Vote.__required_keys__}))
    return votes


def _problem(row: Row) -> str:
    """What is wrong with a row that should be a vote, without what it holds; "" when it is one."""
    if lacking := sorted(Vote.__required_keys__ - row.keys()):
        return f"it has no {', '.join(lacking)}"
    two, text = row["choice"] in PAIRED or row["right"] is not None, row["text"]
    wrong = [key for key in ("id", "rater", "prompt") if not isinstance(row[key], str) or not row[key].strip()]
    wrong += [key for key in ("left", "right")[: 1 + two] if not isinstance(row[key], str)]
    wrong += ["text"] * ((row["choice"] == "edit") != bool(text) or not isinstance(text, str | None))
    wrong += ["note"] * (not isinstance(row["note"], str | None))
    wrong += ["time"] * (not isinstance(row["time"], int | float))
    wrong += ["choice"] * (row["choice"] not in CHOICES or row["choice"] == "skip" or two != (row["choice"] in PAIRED))
    wrong += ["purpose"] * (row["purpose"] not in get_args(Purpose))
    authors = row["authors"]
    named = isinstance(authors, list) and len(authors) == 1 + two and all(isinstance(one, str) for one in authors)
    wrong += ["authors"] * (not named)
    wrong += [key for key in ("prompt", "left", "right", "text", "note") if len(str(row[key] or "")) > LONGEST]
    return f"its {', '.join(dict.fromkeys(wrong))} cannot be" if wrong else ""


def rows_of(votes: Iterable[Vote], kind: str, name: str) -> Iterator[tuple[str, Row]]:
    """(where, row) of the votes that teach, as rows of a record type.

    Preference rows: the better of two answers, a correction against what it corrects. Unpaired ones: these, and answers called
    good or bad, both of two that are bad. Prompts with completions: corrections, and answers that are called good.
    """
    balance: dict[Compared, int] = defaultdict(int)  # votes for it less those against it
    first: dict[Compared, str] = {}
    for vote in votes:
        for prompt, better, worse in _sides(vote) if vote["purpose"] == "teach" else ():
            for key, sign in _compared(kind, prompt, better, worse, balance):
                balance[key] += sign
                first.setdefault(key, vote["id"])
    seen = set[tuple[str, ...]]()
    for (prompt, answer, other), count in balance.items():
        good, bad = (answer, other) if count > 0 else (other, answer)
        where = f"{name}:{first[prompt, answer, other]}"
        for columns in _columns(kind, good, bad) if count else []:
            if (row := (prompt, *map(str, columns.values()))) not in seen:
                seen.add(row)
                yield where, {"id": where, "group": prompt, "prompt": prompt, **columns}


def _compared(
    kind: str, prompt: str, better: str, worse: str, known: Mapping[Compared, int]
) -> list[tuple[Compared, int]]:
    """What a vote compares, and 1 or -1, whether it is for or against that; a label is of one answer alone."""
    if kind == "unpaired":
        return [((prompt, answer, ""), sign) for answer, sign in ((better, 1), (worse, -1)) if answer]
    turned = (prompt, worse, better) in known
    return [((prompt, worse, better), -1) if turned else ((prompt, better, worse), 1)]


def _sides(vote: Vote) -> list[tuple[str, str, str]]:
    """What a vote says: (prompt, better answer, worse answer); "" stands for no other answer."""
    prompt, left, right = vote["prompt"], vote["left"], vote["right"] or ""
    said = {
        "left": [(left, right)], "right": [(right, left)], "both_bad": [("", left), ("", right)], "good": [(left, "")],
        "bad": [("", left)],
        "edit": [(vote["text"] or "", left), (vote["text"] or "", "")],
    }  # fmt: skip
    return [(prompt, better, worse) for better, worse in said.get(vote["choice"], []) if better != worse]


def _columns(kind: str, good: str, bad: str) -> list[Row]:
    """Columns of the rows of a record type that a better and a worse answer give; either may be missing ("")."""
    if kind == "preference":
        return [{"chosen": good, "rejected": bad}] if good and bad else []
    if kind == "unpaired":
        return [{"completion": text, "label": label} for text, label in ((good, True), (bad, False)) if text]
    if kind == "prompt_completion":
        return [{"completion": good}] if not bad else []
    return [{}] if kind == "prompt" else []
