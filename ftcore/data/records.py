"""Rows to records: which columns a method needs, where a data set has them, and how rows are split.

A record type is named by the columns of TRL's dataset formats.
"""

import gc
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt

from ftcore.data.checks import CONTROL, check_characters, check_messages, check_row
from ftcore.data.shapes import is_transcript, shape_of
from ftcore.data.sources import SPLITS, Hub, Row, Split, read_hub, read_rows, split_files
from ftcore.data.splits import Keys, leaked, questions, repeated, split
from ftcore.errors import DataError
from ftcore.settings import PathOfRows, PathOfText, Role

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
# Columns that are checked or read one by one.
LOOKED_AT = frozenset({"id", "answer", "margin", "messages", "label"})
PLACE = re.compile(r"\{(\w+(?:\.\w+)*)\}")


@dataclass(frozen=True)
class Records:
    """Checked rows of one record type. Each row has its `id`, its `where` (file:line) and its columns.

    `notes` say what was noticed in reading, for the person who runs it.
    """

    type: str
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    notes: tuple[str, ...] = ()

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over every split's rows: the same rows in the same order give the same hash anywhere."""
        digest = hashlib.sha256(self.type.encode())
        for part in SPLITS:
            for row in getattr(self, part):
                digest.update(repr([part, *((k, v) for k, v in sorted(row.items()) if k != "where")]).encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set as its YAML says: where each record type comes from, its columns, how rows are split and encoded."""

    path: PathOfRows
    splits: dict[Split, PathOfRows]
    records: dict[str, dict[Split, PathOfRows]]
    hub: Hub | None
    columns: dict[str, str]
    on_bad_row: Literal["fail", "skip"]
    max_bad_rows: Annotated[int, Ge(1)]
    control_characters: Literal["error", "allow"]
    duplicates: Literal["keep", "drop"]
    leakage: Literal["error", "allow"]
    cloze: PathOfText
    test_share: Annotated[float, Ge(0), Lt(1)]
    validation_share: Annotated[float, Ge(0), Lt(1)]
    max_length: Annotated[int, Ge(8), Role("result")]
    too_long: Annotated[Literal["error", "truncate", "drop"], Role("result")]
    max_lost: Annotated[float, Ge(0), Le(1)]
    chat: Annotated[bool | Literal["auto"], Role("result")]

    def load(self, record_type: str) -> Records:
        """Read, check and split the rows of a record type. Raises `DataError` naming file, line and reason."""
        self._check_columns(record_type)
        files = self._files(record_type)
        reader = Reader(self, record_type)
        rows: dict[Any, list[Row]] = {part: list(reader.rows(files[part])) for part in SPLITS if files.get(part)}
        keys = questions(row for part in rows.values() for row in part)
        if "test" not in rows:
            rows["train"], rows["test"] = split(rows["train"], keys, self.test_share, min)
        if "validation" not in rows:
            rows["train"], rows["validation"] = split(rows["train"], keys, self.validation_share, max)
        if not rows["train"]:
            raise DataError(f"{files['train']} is too small: all its rows are held out. Lower data.test_share.")
        train, notes = self._compared(rows, keys, RECORD_TYPES[record_type])
        if self.path and split_files(self.path) and not any(self.splits.values()):
            notes.insert(
                0, f"{self.path}: its files {', '.join(part for part in SPLITS if files[part])} are the splits"
            )
        gc.freeze()  # rows stay as long as the run: looking at a million of them again and again takes half a minute
        return Records(record_type, train, rows["validation"], rows["test"], (*reader.notes(), *notes))

    def whole(self, record_type: str) -> Records:
        """All rows as the test split, unless a file of test rows is named: what `eval` scores of other data."""
        if self._files(record_type).get("test"):
            return self.load(record_type)
        everything = replace(self, test_share=0.0, validation_share=0.0).load(record_type)
        return Records(record_type, [], [], everything.train)

    def read(self, path: str) -> Iterator[tuple[str, Row | DataError]]:
        """(where, row) of a file; overridden by data that is made otherwise."""
        return read_rows(path)

    def _compared(
        self, rows: dict[Any, list[Row]], keys: Keys, columns: tuple[str, ...]
    ) -> tuple[list[Row], list[str]]:
        """The training rows, without duplicates where asked, and what is the same. Raises `DataError` for leakage."""
        train, notes, held_out = rows["train"], [], [*rows["validation"], *rows["test"]]
        if double := repeated(train, keys, columns):
            done = "dropped" if self.duplicates == "drop" else "kept (data.duplicates=drop leaves them out)"
            notes.append(f"{len(double):,} training rows repeat another ({_places(double, 'repeats')}): {done}")
            again = {id(row) for row, _ in double}
            train = train if self.duplicates == "keep" else [row for row in train if id(row) not in again]
        same, near = leaked(train, held_out, keys, columns)
        if same and self.leakage == "error":
            row, where = same[0]
            raise DataError(
                f"{row['where']} is held out and {where} trains on the same question or text; {len(same):,} of "
                f"{len(held_out):,} held-out rows are such. Remove them, or allow it with data.leakage=allow."
            )
        if same:
            notes.append(f"{len(same):,} of {len(held_out):,} held-out rows are in training ({_places(same, 'as')})")
        if near:
            places = _places([(row, "") for row in near])
            notes.append(f"{len(near):,} of {len(held_out):,} held-out rows nearly are in training ({places})")
        return train, notes

    def _files(self, record_type: str) -> dict[Split, Any]:
        if self.records and (self.path or any(self.splits.values())):
            raise DataError(
                "This data option has its own rows; for rows of your own choose data=jsonl data.path=<file>."
            )
        source = record_type if record_type in self.records else DERIVED.get(record_type, record_type)
        files: dict[Split, Any] = dict(self.records.get(source, {}) if self.records else self.splits)
        if self.path and not any(files.values()):
            files |= split_files(self.path)
        files["train"] = files.get("train") or self.path
        if not files["train"] and self.hub:
            return dict(self.hub["splits"])
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


def _places(found: list[tuple[Row, str]], word: str = "") -> str:
    """Where the first of them stand."""
    first = [f"{row['where']} {word} {where}".strip() for row, where in found[:5]]
    return ", ".join([*first, *(["..."] if len(found) > 5 else [])])


class Reader:
    """Rows of one record type from files: columns mapped, shapes recognised, every row checked. Counts what it skips."""

    def __init__(self, data: Data, record_type: str) -> None:
        self.data, self.record_type, self.required = data, record_type, RECORD_TYPES[record_type]
        # A hub set's columns are its own; a local copy of it has ours, unless the user maps others.
        self.hub = None if data.path or any(data.splits.values()) or data.records else data.hub
        names = data.columns or (self.hub["columns"] if self.hub else {})
        self.columns = {target: _filled(source) for target, source in names.items()}
        self.mapped = {*names, *names.values()}
        self.bad: list[str] = []
        self.shapes: dict[str, str] = {}
        self.misspelt: dict[str, str] | None = None

    def rows(self, path: str) -> Iterator[Row]:
        """Checked rows. Raises `DataError` for a wrong one, or after `max_bad_rows` of them where they are skipped."""
        for where, raw in read_hub(self.hub, path) if self.hub else self.data.read(path):
            if self.misspelt is None and type(raw) is dict:  # the first row speaks for all
                self.misspelt = _misspelt({*raw} - self.mapped, {*self.required, *OPTIONAL})
            if self._is_usual(raw):
                yield {"id": where, **raw, "where": where}  # type: ignore[dict-item]
                continue
            try:
                yield from self._checked(raw, where)
            except DataError as error:
                self.bad.append(where)
                if self.data.on_bad_row == "fail":
                    raise
                if len(self.bad) > self.data.max_bad_rows:
                    raise DataError(
                        f"{error} It is bad row {len(self.bad)}; data.max_bad_rows={self.data.max_bad_rows}."
                    ) from None

    def notes(self) -> list[str]:
        """What was recognised and what was left out."""
        bad = [f"{len(self.bad):,} bad rows skipped ({', '.join(self.bad[:5])}{' ...' if len(self.bad) > 5 else ''})"]
        shapes = [f"{file}: read as {shape}" for file, shape in self.shapes.items()]
        words = [
            f"column {word!r} is not used; did you mean {near!r}?"
            for word, near in (self.misspelt or {}).items()
            if near
        ]
        return [*shapes, *words, *(bad if self.bad else [])]

    def _is_usual(self, raw: Row | DataError) -> bool:
        """Whether a row needs no closer look: text in every column that is needed, and nothing that has rules of its own."""
        if type(raw) is not dict or self.columns or not LOOKED_AT.isdisjoint(raw):
            return False
        for column in self.required:
            value = raw.get(column)
            if type(value) is not str or not value or value.isspace() or CONTROL.search(value):
                return False
        return not is_transcript(raw.get("prompt"))

    def _checked(self, raw: Row | DataError, where: str) -> list[Row]:
        if isinstance(raw, DataError):
            raise raw
        row = self._mapped(raw, where)
        rows = derive(row, self.record_type)
        for made in rows:
            check_row(made, self.required, self.data.columns, raw)
            if self.data.control_characters == "error":
                check_characters(made, self.required)
        return rows

    def _mapped(self, raw: Row, where: str) -> Row:
        row = raw
        if self.columns:
            row = {column: value for column, value in raw.items() if column not in self.mapped}
            row |= {target: value for target, fill in self.columns.items() if (value := fill(raw)) is not None}
            for target, names in (self.hub["values"] if self.hub else {}).items():
                row[target] = names.get(str(row.get(target)), row.get(target))
        elif self._looks_different(raw) and (shape := shape_of(raw)):
            self.shapes[where.rpartition(":")[0]] = shape[0]
            try:
                row = shape[2](raw)
            except (KeyError, IndexError, TypeError, AttributeError):
                raise DataError(f"{where}: is not the {shape[0]} that its columns say.") from None
        return {**row, "id": str(row["id"]) if "id" in row else where, "where": where}

    def _looks_different(self, raw: Row) -> bool:
        """Whether a row may be of another shape, though its columns may have our names."""
        return is_transcript(raw.get("prompt")) or not all(isinstance(raw.get(c), str | bool) for c in self.required)


def _misspelt(there: set[str], known: set[str]) -> dict[str, str]:
    """Columns that nobody reads, and the one that each may be meant for; "" for none."""
    return {
        column: next(iter(get_close_matches(column, known - there, 1, 0.8)), "") for column in sorted(there - known)
    }


def _filled(source: str) -> Callable[[Row], Any]:
    """A column's value, or a template's: `{name}` stands for a column, `{name.key}` for what is inside it."""
    if not PLACE.search(source):
        return lambda raw: raw.get(source)
    return lambda raw: PLACE.sub(lambda found: _inside(raw, found[1].split(".")), source)


def _inside(value: Any, path: list[str]) -> str:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise DataError(f"data.columns: a template names {'.'.join(path)!r}, which a row does not have.")
        value = value[key]
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


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


def _options_with(record_type: str) -> str:
    import yaml

    from ftcore.files import resources

    files = sorted((resources() / "conf" / "data").glob("[!_]*.yaml"))
    nodes = {file.stem: yaml.safe_load(file.read_text()) for file in files}
    types = {record_type, DERIVED.get(record_type, record_type)}
    names = [name for name, node in nodes.items() if "hub" not in node and types & set(node.get("records", types))]
    return f"Data options that have them: {', '.join(names)}."
