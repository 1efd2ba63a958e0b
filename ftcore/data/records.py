"""Rows to records: which columns a method needs, where a data set has them, and how rows are split.

A record type is named by the columns of TRL's dataset formats.
"""

import gc
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Annotated, Literal

import orjson
import yaml
from annotated_types import Ge, Le, Lt

from ftcore.data.checks import check_characters, check_row, named
from ftcore.data.columns import UNTYPED, columns_in, filled, typed_columns
from ftcore.data.messages import KNOWN
from ftcore.data.shapes import CONTEXT, SHAPES, SWITCH_COLUMNS, is_on, read, spoken
from ftcore.data.sources import (
    SPLITS,
    Hub,
    Paths,
    Row,
    Split,
    files_of,
    held_out_by_name,
    left_out,
    read_hub,
    read_rows,
    split_files,
)
from ftcore.data.splits import Keys, leaked, question_keys, repeated, split
from ftcore.errors import DataError
from ftcore.files import resources
from ftcore.settings import PathOfRows, PathOfText, Role

Parts = dict[Split, list[Row]]
# Record type -> columns that every row must have, as non-empty text (`label`: true or false).
RECORD_TYPES = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt": ("prompt",),
}
# Record type -> the type that it can be made of when a data option has no rows of it.
DERIVED = {"unpaired": "preference", "prompt": "prompt_completion", "text": "prompt_completion"}
# Columns that a row may have beside the required ones: `messages` stands for prompt and completion.
OPTIONAL = ("id", "group", "source", "answer", "margin", "messages")
# What differs from row to row in a reason that makes them bad.
VARIES = re.compile(r"\d[\d,]*|U\+[0-9A-F]+|the roles are [\w, ]*")
# Unused columns that a note names.
LISTED = 10


@dataclass(frozen=True)
class Records:
    """Checked rows of one record type. Each row has its `id`, its `where` (file:line) and its columns.

    `notes` say what reading found: shapes that were recognised, rows that were skipped, duplicates.
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
    """A data set as its YAML describes it: the files of each record type, their columns, how rows are split and encoded."""

    path: PathOfRows
    splits: dict[Split, PathOfRows]
    records: dict[str, dict[Split, PathOfRows]]
    hub: Hub | None
    columns: dict[str, str]
    values: dict[str, dict[str, str | bool | float]]
    on_bad_row: Literal["fail", "skip"]
    max_bad_rows: Annotated[int, Ge(1)]
    max_line_mb: Annotated[int, Ge(1), Le(2048)]
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

    @property
    def has_files(self) -> bool:
        """Whether `path` or `splits` name files."""
        return bool(self.path or any(self.splits.values()))

    def load(self, record_type: str) -> Records:
        """Read, check and split the rows of a record type. Raises `DataError` naming file, line and reason."""
        self._check_columns(record_type)
        files, reader = self._files(record_type), Reader(self, record_type)
        rows: Parts = {part: list(reader.rows(path)) for part in SPLITS if (path := files.get(part))}
        if not reader.hub:
            name_apart(rows, files)
        everything = [row for part in rows.values() for row in part]
        if not everything:
            reasons = "; ".join(reader.reasons()) or "There is none"
            raise DataError(f"{_paths(files['train'])}: no row can be used. {reasons}.")
        reader.check_equal(len(everything))
        shared, keys = distinguish(everything), question_keys(everything)
        if "test" not in rows:
            rows["train"], rows["test"] = split(rows["train"], keys, self.test_share, min)
        if "validation" not in rows:
            rows["train"], rows["validation"] = split(rows["train"], keys, self.validation_share, max)
        if not rows["train"]:
            raise DataError(f"{_paths(files['train'])} is too small: all its rows are held out. Lower data.test_share.")
        train, notes = self._compared(rows, keys, RECORD_TYPES[record_type])
        notes[:0] = self._files_read(files)
        gc.freeze()  # rows stay as long as the run: looking at a million of them again and again takes half a minute
        if shared:
            notes.append(f"{shared:,} rows share their id with another: they are named by file and line")
        return Records(record_type, train, rows["validation"], rows["test"], (*reader.notes(), *notes))

    def load_as_test(self, record_type: str) -> Records:
        """All rows as the test split, unless a file of test rows is named: what `eval` scores of other data."""
        if self._files(record_type).get("test"):
            return self.load(record_type)
        rows = replace(self, test_share=0.0, validation_share=0.0).load(record_type).train
        return Records(record_type, [], [], rows)

    def read(self, path: Paths, record_type: str) -> Iterator[tuple[str, Row | DataError]]:
        """(where, row) of a file. Data that is not read from files, or gives each record type other rows, overrides this."""
        return read_rows(path, self.max_line_mb)

    def _compared(self, rows: Parts, keys: Keys, columns: tuple[str, ...]) -> tuple[list[Row], list[str]]:
        """The training rows, without duplicates where asked, and notes on equal rows. Raises `DataError` for leakage."""
        train, notes, held_out = rows["train"], [], [*rows["validation"], *rows["test"]]
        if repeats := repeated(train, keys, columns):
            dropped = self.duplicates == "drop"
            done = "dropped" if dropped else "kept (data.duplicates=drop leaves them out)"
            places = _first_of([f"{row['where']} repeats {where}" for row, where in repeats])
            notes.append(f"{len(repeats):,} training rows repeat another ({places}): {done}")
            again = {id(row) for row, _ in repeats if dropped}
            train = [row for row in train if id(row) not in again]
        same, near = leaked(train, held_out, keys, columns)
        total = f"of {len(held_out):,} held-out rows"
        if same and self.leakage == "error":
            row, where = same[0]
            raise DataError(
                f"{row['where']} is held out and {where} trains on the same question or text; {len(same):,} {total} are "
                "affected. Remove them, or allow it with data.leakage=allow."
            )
        if same:
            places = _first_of([f"{row['where']} as {where}" for row, where in same])
            notes.append(f"{len(same):,} {total} are in training ({places})")
        if near:
            notes.append(f"{len(near):,} {total} nearly are in training ({_first_of([row['where'] for row in near])})")
        return train, notes

    def _files_read(self, files: dict[Split, Paths | None]) -> list[str]:
        """Notes on the files of a folder: which are the splits, and which are left out."""
        if not self.path or any(self.splits.values()):
            return []
        notes, read = [], [path for path in files.values() if path]
        if split_files(self.path):
            named = ", ".join(f"{part} ({len(files_of(path)[1])})" for part in SPLITS if (path := files[part]))
            notes.append(f"{self.path}: its files {named} are the splits")
        elif held_out := held_out_by_name(self.path):
            notes.append(
                f"{self.path}: by their names all its files are held-out rows ({_first_of(held_out)}), and they train"
            )
        if left := left_out(self.path, read):
            notes.append(f"{self.path}: {len(left):,} files are not read ({_first_of(left)})")
        return notes

    def _files(self, record_type: str) -> dict[Split, Paths | None]:
        """Path of each split."""
        if self.records and self.has_files:
            raise DataError("This data option has its own rows. For yours choose data=jsonl data.path=<file>.")
        source = record_type if record_type in self.records else DERIVED.get(record_type, record_type)
        files: dict[Split, Paths | None] = dict(self.records.get(source) or self.splits)
        if self.path and not any(files.values()):
            files |= split_files(self.path)
        files["train"] = files.get("train") or self.path
        if not files["train"] and self.hub:
            return dict(self.hub["splits"])
        if not files["train"]:
            types = ", ".join(self.records) or "none"
            raise DataError(f"This data set has no {record_type} rows (it has: {types}). {_options_with(record_type)}")
        return files

    def _check_columns(self, record_type: str) -> None:
        known = {*RECORD_TYPES[record_type], *RECORD_TYPES.get(DERIVED.get(record_type, ""), ()), *OPTIONAL}
        if unknown := sorted(set(self.columns) - known):
            raise DataError(
                f"data.columns: {', '.join(unknown)} means nothing for {record_type} rows, which have {', '.join(sorted(known))}."
            )


def _paths(paths: Paths | None) -> str:
    """The paths of a split in a message."""
    return _first_of([*paths[1:]]) if isinstance(paths, tuple) else str(paths)


def _first_of(places: list[str]) -> str:
    return ", ".join(places[:5]) + (" ..." if len(places) > 5 else "")


class Reader:
    """Rows of one record type from files: columns mapped, shapes recognised, every row checked. Counts what it skips."""

    def __init__(self, data: Data, record_type: str) -> None:
        self.data, self.record_type, self.required = data, record_type, RECORD_TYPES[record_type]
        self.hub = None if data.has_files or data.records else data.hub
        # A local copy of a hub set has that set's columns or ours, unless the user maps others.
        self.may_have_ours = not self.hub and not data.columns
        theirs = None if data.records else data.hub
        names = data.columns or (theirs["columns"] if theirs else {})
        self.columns = {target: filled(source) for target, source in names.items()}
        self.mapped = {*names, *(found for source in names.values() for found in columns_in(source))}
        values = data.values or (theirs["values"] if theirs else {})
        self.values = {column: {str(key): value for key, value in names.items()} for column, names in values.items()}
        self.bad: list[tuple[str, str]] = []  # where, reason
        self.off = 0
        self.keys_of_messages: set[str] = set()
        self.equal: list[str] = []  # where pairs have two equal answers
        self.shapes: dict[str, str] = {}
        self.seen: set[str] = set()

    def rows(self, path: Paths) -> Iterator[Row]:
        """Checked rows. Raises `DataError` for a wrong one, or after `max_bad_rows` of them where they are skipped."""
        hub = self.hub
        for where, raw in read_hub(hub, str(path)) if hub else self.data.read(path, self.record_type):
            if isinstance(raw, dict):
                self.seen.update(raw)
            try:
                yield from self._checked(raw, where)
            except DataError as error:
                self.bad.append((where, str(error).partition(": ")[2]))
                if self.data.on_bad_row == "fail":
                    raise DataError(f"{error} data.on_bad_row=skip leaves such rows out and counts them.") from None
                if len(self.bad) > self.data.max_bad_rows:
                    limit = f"data.max_bad_rows={self.data.max_bad_rows}"
                    raise DataError(f"{error} It is bad row {len(self.bad)}; {limit}.") from None

    def check_equal(self, rows: int) -> None:
        """Raise `DataError` when more than `data.max_lost` of all rows are pairs of two equal answers."""
        if len(self.equal) > self.data.max_lost * rows:
            raise DataError(
                f"{self.equal[0]}: chosen equals rejected, as in {len(self.equal):,} of {rows:,} rows. Correct or remove them, "
                "or raise data.max_lost."
            )

    def notes(self) -> list[str]:
        """Shapes that were recognised, columns that are not used, rows that were skipped or are switched off."""
        notes = [f"{file}: read as {shape}" for file, shape in self.shapes.items()]
        notes += self._unused()
        notes += self._switched_off()
        if left := sorted(self.keys_of_messages - KNOWN):
            notes.append(f"keys of messages that only a chat template may read: {named(left, LISTED)}")
        if self.equal:
            notes.append(
                f"{len(self.equal):,} pairs have two equal answers and teach nothing ({_first_of(self.equal)})"
            )
        if self.bad:
            notes.append(f"{len(self.bad):,} bad rows skipped ({_first_of([where for where, _ in self.bad])})")
            notes += self._reasons()
        return notes

    def reasons(self) -> list[str]:
        """Why rows are left out."""
        return [*self._reasons(), *self._switched_off()]

    def _reasons(self) -> list[str]:
        """How often which reason made rows bad, whatever places and roles it names, and where first."""
        kinds = [VARIES.sub("#", reason) for _, reason in self.bad]
        first = dict(zip(reversed(kinds), reversed(self.bad), strict=True))
        counts = Counter(kinds).most_common()
        return [f"{n:,} x (first {first[kind][0]}) {first[kind][1].rstrip('.')}" for kind, n in counts]

    def _switched_off(self) -> list[str]:
        switches = ", ".join(sorted(SWITCH_COLUMNS & self.seen))
        return [f"{self.off:,} rows left out: they are switched off ({switches})"] if self.off else []

    def _unused(self) -> list[str]:
        """Columns that are not used: those that look misspelt, and the others, which rewards may read."""
        known = {*self.required, *OPTIONAL, *SWITCH_COLUMNS, "kto_tag"}
        known |= CONTEXT if self.keys_of_messages else set()  # a plain text has no system message
        known |= {
            column
            for shape in SHAPES
            if shape.name in self.shapes.values()
            for column in (*shape.columns, *shape.others)
        }
        left, notes = sorted(self.seen - self.mapped - known), []
        for column in left:
            for near in get_close_matches(column, {*self.required, *OPTIONAL} - self.seen, 1, 0.8):
                notes.append(f"column {column!r} is not used; did you mean {near!r}?")
        if len(left) > len(notes) and self.data.has_files and self.record_type != "prompt":
            notes.append(f"columns that are not used: {named(left, LISTED)}")
        return notes

    def _checked(self, raw: Row | DataError, where: str) -> list[Row]:
        if isinstance(raw, DataError):
            raise raw
        if not is_on(raw, where):
            self.off += 1
            return []
        row = self._mapped(raw, where)
        if "chosen" in row and row["chosen"] == row.get("rejected"):
            self.equal.append(where)
        for message in row.get("messages", ()):
            self.keys_of_messages.update(message)
        rows = derive(row, self.record_type)
        for row in rows:
            check_row(row, self.required, self.data.columns, raw)
            if self.data.control_characters == "error":
                check_characters(row, self.required)
        return rows

    def _mapped(self, raw: Row, where: str) -> Row:
        """A row in our columns."""
        row = raw
        if self.columns and not (self.may_have_ours and row.keys() >= {*self.required}):
            ours = {*self.columns, *(self.mapped & {*self.required, *OPTIONAL})}
            row = {column: value for column, value in raw.items() if column not in ours}
            try:
                row |= {target: value for target, fill in self.columns.items() if (value := fill(raw)) is not None}
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
        for target, names in self.values.items():
            if target in row:
                row = {**row, target: names.get(str(row[target]), row[target])}
        shape, row = read(row, where, self.required)
        if shape:
            self.shapes[where.rpartition(":")[0]] = shape
        row = row if UNTYPED.isdisjoint(row) else {**row, **typed_columns(row)}
        return {**row, "id": str(row["id"]) if row.get("id") is not None else where, "where": where}


def distinguish(rows: list[Row]) -> int:
    """Name rows that share their id with another by file and line, and return how many do."""
    counts, lines = Counter(row["id"] for row in rows), Counter[str]()
    shared = [row for row in rows if counts[row["id"]] > 1]
    for row in shared:
        lines[row["where"]] += 1
        number = lines[row["where"]]  # a pair gives two rows
        row["id"] = row["where"] if number == 1 else f"{row['where']}/{number}"
    return len(shared)


def name_apart(rows: Parts, files: dict[Split, Paths | None]) -> None:
    """Name rows of a file that is called like one of an earlier split by the file's whole path."""
    earlier = set[str]()
    for part, own in rows.items():
        names = {row["where"].rpartition(":")[0] for row in own}
        folder = files_of(path)[0] if names & earlier and (path := files[part]) else None
        for row in own if folder else []:
            where = f"{folder}/{row['where']}"
            if row["id"] == row["where"]:
                row["id"] = where
            row["where"] = where
        earlier |= names


def derive(row: Row, record_type: str) -> list[Row]:
    """A row as rows of `record_type`, made of another type's columns where it lacks its own.

    A conversation's last question and answer become prompt and completion, a pair a good and a bad answer, a question and its
    answer a text.
    """
    if record_type == "unpaired" and "label" not in row and row.keys() >= {"chosen", "rejected"}:
        sides = (("chosen", True), ("rejected", False))
        return [{**row, "id": f"{row['id']}/{side}", "completion": row[side], "label": good} for side, good in sides]
    if record_type == "text" and "text" not in row and row.keys() >= {"prompt", "completion"}:
        said = [orjson.dumps(row["tools"]).decode()] if "tools" in row else []
        said += [message["content"] or spoken(message) for message in row.get("messages", ())]
        return [{**row, "text": "\n".join(said or [row["prompt"], row["completion"]])}]
    return [row]


def _options_with(record_type: str) -> str:
    types = {record_type, DERIVED.get(record_type, record_type)}
    nodes = {file.stem: yaml.safe_load(file.read_text()) for file in (resources() / "conf/data").glob("[!_]*.yaml")}
    names = [name for name, node in nodes.items() if "hub" not in node and types & {*node.get("records", types)}]
    return f"Data options that have them: {', '.join(sorted(names))}."
