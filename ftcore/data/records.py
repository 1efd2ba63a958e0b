"""Rows to records: which columns a method needs, where a data set has them, and how rows are split.

A record type is named by the columns of TRL's dataset formats.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from ftcore.data.sources import Row, read_jsonl
from ftcore.errors import DataError

# Record type -> columns that every row must have, as non-empty text.
RECORD_TYPES = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "prompt": ("prompt",),
}
SPLITS = ("train", "validation", "test")


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
    splits: dict[Literal["train", "validation", "test"], str | None]
    records: dict[str, dict[Literal["train", "validation", "test"], str | None]]
    columns: dict[str, str]
    test_share: Annotated[float, Ge(0), Lt(1)]
    validation_share: Annotated[float, Ge(0), Lt(1)]
    max_length: Annotated[int, Ge(8)]
    too_long: Literal["error", "truncate", "drop"]
    chat: bool | Literal["auto"]

    def load(self, record_type: str) -> Records:
        """Read, check and split the rows of a record type. Raises `DataError` naming file, line and reason."""
        files = dict(self.records.get(record_type) or self.splits)
        files["train"] = files.get("train") or (self.path if not self.records else None)
        if not files.get("train"):
            have = ", ".join(self.records) or "none"
            raise DataError(f"This data set has no {record_type} rows (it has: {have}). {_options_with(record_type)}")
        rows = {split: list(self._rows(files[split], record_type)) for split in SPLITS if files.get(split)}
        shares = {"test": self.test_share, "validation": self.validation_share}
        for split, share in shares.items():
            if split not in rows:
                rows[split], rows["train"] = _split_by_hash(rows["train"], share)
        if not rows["train"]:
            raise DataError(f"No rows are left to train on: {files['train']} is too small to hold rows out of it.")
        return Records(record_type, rows["train"], rows["validation"], rows["test"])

    def _rows(self, path: str | None, record_type: str) -> Iterator[Row]:
        assert path is not None
        name = path.rsplit("/", 1)[-1]
        required = RECORD_TYPES[record_type]
        renamed = {source: target for target, source in self.columns.items()}
        for line, raw in read_jsonl(path):
            row = {renamed.get(column, column): value for column, value in raw.items()}
            where = f"{name}:{line}"
            _check_row(row, required, where, self.columns, sorted(raw))
            yield {**row, "id": str(row.get("id", where)), "where": where}


def _check_row(row: Row, required: tuple[str, ...], where: str, columns: dict[str, str], present: list[str]) -> None:
    for column in required:
        source = columns.get(column, column)
        if column not in row:
            raise DataError(
                f"{where}: there is no column {source!r}; the row has {', '.join(present)}. Say which column holds the "
                f"{column}: data.columns.{column}=<name>."
            )
        value = row[column]
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise DataError(f"{where}: column {source!r} must be text, not {kind}. Correct or remove the row.")
        if not value.strip():
            raise DataError(f"{where}: column {source!r} is empty. Correct or remove the row.")


def _split_by_hash(rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
    """(held out, rest), decided for each row by a hash of its `group` or normalised prompt or text alone.

    Equal texts stay together and a row never changes sides when others are added. A share above 0 holds out at least one.
    """
    if share <= 0:
        return [], rows
    positions = [_position(row) for row in rows]
    limit = max(share, min(positions, default=0.0))
    held_out = [row for row, position in zip(rows, positions, strict=True) if position <= limit]
    return held_out, [row for row, position in zip(rows, positions, strict=True) if position > limit]


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
    names = [name for name, node in nodes.items() if record_type in node.get("records", {}) or "path" in node]
    return f"Data options that have them: {', '.join(names)}."
