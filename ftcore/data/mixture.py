"""Several data sets as one: rows of each source, capped or repeated, with a count of each."""

from dataclasses import dataclass, fields, replace
from typing import Annotated

from annotated_types import Ge, Gt
from typing_extensions import TypedDict

from ftcore.data.formats import Row
from ftcore.data.records import RECORD_TYPES, SPLITS, Data, Parts, Records
from ftcore.data.splits import position, question_keys
from ftcore.errors import DataError
from ftcore.settings import Role


class Source(TypedDict):
    """One source: its rows, its columns, how often its training rows are seen, and how many of them are taken at most."""

    path: Annotated[str, Role(path="rows")]
    columns: dict[str, str]
    weight: Annotated[float, Gt(0)]
    max_rows: Annotated[int, Ge(1)] | None


@dataclass(frozen=True, kw_only=True)
class Mixture(Data):
    """A data set made of several. Each source is split by itself; rows keep its name as `source`."""

    sources: dict[str, Source]

    def load(self, record_type: str) -> Records:
        """Rows of all sources. Raises `DataError` as each of them would, and for leakage between them."""
        if not self.sources:
            raise DataError("data=mixture needs sources: data.sources.<name>={path: rows.jsonl, weight: 1}.")
        parts = {name: self._part(name, source, record_type) for name, source in self.sources.items()}
        rows: Parts = {s: [row for part in parts.values() for row in getattr(part, s)] for s in SPLITS}
        train, notes = self._compared(
            rows, question_keys(row for part in rows.values() for row in part), RECORD_TYPES[record_type]
        )
        kept = {id(row) for row in train}
        weighed: list[Row] = []
        for name, part in parts.items():
            own = _weighed([row for row in part.train if id(row) in kept], self.sources[name]["weight"])
            weighed += own
            notes.append(f"{name}: {len(own):,} train ({len(part.train):,} different), {len(part.test):,} held out")
        told = (f"{name}: {note}" for name, part in parts.items() for note in part.notes)
        return Records(record_type, weighed, rows["validation"], rows["test"], (*told, *notes))

    def _part(self, name: str, source: Source, record_type: str) -> Records:
        shared = {field.name: getattr(self, field.name) for field in fields(Data)}
        part = Data(**{**shared, "path": source["path"], "columns": source["columns"] or self.columns}).load(
            record_type
        )
        named = {s: [{**row, "source": name, "id": f"{name}/{row['id']}"} for row in getattr(part, s)] for s in SPLITS}
        if source["max_rows"]:  # those that come first by the hash of their text, so that other rows change little
            named["train"] = sorted(named["train"], key=lambda row: position(_text(row)))[: source["max_rows"]]
        return replace(part, train=named["train"], validation=named["validation"], test=named["test"])


def _weighed(rows: list[Row], weight: float) -> list[Row]:
    """Each row as often as `weight` says; of a fraction, the rows that come first by the hash of their text."""
    whole = int(weight)
    extra = [row for row in rows if position(_text(row)) < weight - whole]
    copies = [{**row, "id": f"{row['id']}/{k}"} for k in range(1, whole) for row in rows]
    return [*(rows if whole else []), *copies, *({**row, "id": f"{row['id']}/+"} for row in extra)]


def _text(row: Row) -> str:
    return " ".join(str(row[column]) for column in sorted(row) if column not in {"id", "where", "source"})
