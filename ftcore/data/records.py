"""Rows to records: which columns a method needs, where a data set has them, and how rows are split.

A record type is named by the columns of TRL's dataset formats.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from ftcore.data.sources import Row, read_jsonl
from ftcore.errors import DataError

Split = Literal["train", "validation", "test"]
# Record type -> columns that every row must have, as non-empty text (`label`: true or false).
RECORD_TYPES = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt": ("prompt",),
}
# Record type -> the type whose rows it can be made of when a data option has no rows of its own.
DERIVED = {"unpaired": "preference", "prompt": "prompt_completion", "text": "prompt_completion"}
# Columns that a row may have beside the required ones: `messages` stands for prompt and completion.
OPTIONAL = ("id", "group", "answer", "margin", "messages")
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Records:
    """Checked rows of one record type. Each row has its `id`, its `where` (file:line) and its columns."""

    type: str
    train: list[Row]
    validation: list[Row]
    test: list[Row]

    def content_hash(self) -> str:
        """SHA-256 over every split's rows: the same rows in the same order give the same hash anywhere."""
        digest = hashlib.sha256(self.type.encode())
        for split in SPLITS:
            for row in getattr(self, split):
                digest.update(repr([split, *((k, v) for k, v in sorted(row.items()) if k != "where")]).encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set as its YAML says: where each record type comes from, its columns, how rows are split and encoded."""

    path: str | None
    splits: dict[Split, str | None]
    records: dict[str, dict[Split, str | None]]
    columns: dict[str, str]
    cloze: str | None
    test_share: Annotated[float, Ge(0), Lt(1)]
    validation_share: Annotated[float, Ge(0), Lt(1)]
    max_length: Annotated[int, Ge(8)]
    too_long: Literal["error", "truncate", "drop"]
    chat: bool | Literal["auto"]

    def load(self, record_type: str) -> Records:
        """Read, check and split the rows of a record type. Raises `DataError` naming file, line and reason."""
        self._check_columns(record_type)
        files = self._files(record_type)
        rows = {split: list(self._rows(files[split], record_type)) for split in SPLITS if files.get(split)}
        if "test" not in rows:
            rows["train"], rows["test"] = _split(rows["train"], self.test_share, min)
        if "validation" not in rows:
            rows["train"], rows["validation"] = _split(rows["train"], self.validation_share, max)
        if not rows["train"]:
            raise DataError(f"{files['train']} is too small: all its rows are held out. Lower data.test_share.")
        return Records(record_type, rows["train"], rows["validation"], rows["test"])

    def whole(self, record_type: str) -> Records:
        """All rows as the test split, unless a file of test rows is named: what `eval` scores of other data."""
        if self._files(record_type).get("test"):
            return self.load(record_type)
        everything = replace(self, test_share=0.0, validation_share=0.0).load(record_type)
        return Records(record_type, [], [], everything.train)

    def _files(self, record_type: str) -> dict[Split, Any]:
        if self.records and (self.path or any(self.splits.values())):
            raise DataError(
                "This data option has its own rows; for rows of your own choose data=jsonl data.path=<file>."
            )
        source = record_type if record_type in self.records else DERIVED.get(record_type, record_type)
        files = dict(self.records.get(source, {}) if self.records else self.splits)
        files["train"] = files.get("train") or self.path
        if not files["train"]:
            have = ", ".join(self.records) or "none"
            raise DataError(f"This data set has no {record_type} rows (it has: {have}). {_options_with(record_type)}")
        return files

    def _check_columns(self, record_type: str) -> None:
        known = {*RECORD_TYPES[record_type], *RECORD_TYPES.get(DERIVED.get(record_type, ""), ()), *OPTIONAL}
        if unknown := sorted(set(self.columns) - known):
            raise DataError(
                f"data.columns: {', '.join(unknown)} means nothing for {record_type} rows, which have {', '.join(sorted(known))}."
            )

    def _rows(self, path: str, record_type: str) -> Iterator[Row]:
        name = path.rsplit("/", 1)[-1]
        mapped = set(self.columns) | set(self.columns.values())
        for line, raw in read_jsonl(path):
            row = {column: value for column, value in raw.items() if column not in mapped}
            row |= {target: raw[source] for target, source in self.columns.items() if source in raw}
            where = f"{name}:{line}"
            row = {**row, "id": str(row.get("id", where)), "where": where}
            for made in derive(row, record_type):
                _check_row(made, RECORD_TYPES[record_type], where, self.columns, sorted(raw))
                yield made


def derive(row: Row, record_type: str) -> list[Row]:
    """A row as rows of the type that is asked for, where another type's columns hold what it needs.

    A conversation's last question and answer become prompt and completion, a pair a good and a bad answer, a question and its
    answer a text.
    """
    if "messages" in row:
        row = {**row, **check_messages(row["messages"], row["where"])}
    if record_type == "unpaired" and "label" not in row and {"chosen", "rejected"} <= set(row):
        sides = (("chosen", True), ("rejected", False))
        return [{**row, "id": f"{row['id']}/{side}", "completion": row[side], "label": good} for side, good in sides]
    if record_type == "text" and "text" not in row and {"prompt", "completion"} <= set(row):
        return [{**row, "text": f"{row['prompt']}\n{row['completion']}"}]
    return [row]


def check_messages(messages: Any, where: str) -> Row:
    """Prompt and completion of a conversation: its last question and answer.

    Raises `DataError` unless an optional system message is followed by user and assistant in turn, the assistant last.
    """
    fix = 'Messages look like [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{where}: messages must be a list of objects. {fix}")
    for k, message in enumerate(messages, 1):
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise DataError(f"{where}: message {k} has no text in 'content'. {fix}")
    roles = [message.get("role") for message in messages]
    if set(map(str, roles)) - {"system", "user", "assistant"}:
        raise DataError(f"{where}: a role is not one of system, user, assistant. {fix}")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(
            f"{where}: after at most one system message, user and assistant must take turns and the assistant end; the roles "
            f"are {', '.join(roles)}."
        )
    return {"prompt": messages[-2]["content"], "completion": messages[-1]["content"]}


def _check_row(row: Row, required: tuple[str, ...], where: str, columns: dict[str, str], present: list[str]) -> None:
    for column in required:
        source = columns.get(column, column)
        if column not in row:
            raise DataError(
                f"{where}: there is no column {source!r}; the row has {', '.join(present)}. Say which column holds the "
                f"{column}: data.columns.{column}=<name>."
            )
        _check_value(row[column], source, bool if column == "label" else str, where)
    answers = row.get("answer", [])
    if not isinstance(answers, str) and not (
        isinstance(answers, list) and all(isinstance(text, str) for text in answers)
    ):
        raise DataError(
            f"{where}: column {columns.get('answer', 'answer')!r} must be text or a list of texts that count as right."
        )
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise DataError(f"{where}: column {columns.get('margin', 'margin')!r} must be a number.")


def _check_value(value: Any, source: str, kind: type, where: str) -> None:
    if not isinstance(value, kind):
        found = "null" if value is None else type(value).__name__
        wanted = "true or false" if kind is bool else "text"
        raise DataError(f"{where}: column {source!r} must be {wanted}, not {found}. Correct or remove the row.")
    if isinstance(value, str) and not value.strip():
        raise DataError(f"{where}: column {source!r} is empty. Correct or remove the row.")


def _split(rows: list[Row], share: float, end: Callable[..., float]) -> tuple[list[Row], list[Row]]:
    """(rest, held out) by a hash of each row's `group` or normalised prompt or text: never by its place in the file.

    Equal texts stay together and a row never changes sides when others are added. Held out is the share of the scale at its
    lower (`end=min`) or upper end (`max`), and at least the outermost text, as long as another is left.
    """
    if share <= 0:
        return rows, []
    positions = [_position(row) for row in rows]
    chosen = {p for p in positions if (p < share if end is min else p >= 1 - share)}
    if not chosen and len(set(positions)) > 1:
        chosen = {end(positions)}
    rest = [row for row, position in zip(rows, positions, strict=True) if position not in chosen]
    return rest, [row for row, position in zip(rows, positions, strict=True) if position in chosen]


def _position(row: Row) -> float:
    """A number in [0, 1) that depends on the row's group or normalised text only."""
    text: Any = row.get("group") or row.get("prompt") or row["text"]
    normalised = " ".join(re.findall(r"\w+", str(text).lower())) or str(text)
    return int.from_bytes(hashlib.sha256(normalised.encode()).digest()[:8]) / 2**64


def _options_with(record_type: str) -> str:
    import yaml

    from ftcore.resources import resources

    files = sorted((resources() / "conf" / "data").glob("[!_]*.yaml"))
    nodes = {file.stem: yaml.safe_load(file.read_text()) for file in files}
    types = {record_type, DERIVED.get(record_type, record_type)}
    names = [name for name, node in nodes.items() if types & set(node.get("records", types))]
    return f"Data options that have them: {', '.join(names)}."
