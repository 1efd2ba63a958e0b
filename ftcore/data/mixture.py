"""Several data sets as one: rows of each source, capped or repeated, with a count of each."""

from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge, Gt
from typing_extensions import TypedDict

from ftcore.data.formats import Row
from ftcore.data.records import RECORD_TYPES, SPLITS, Data, Parts, Records
from ftcore.data.splits import position, question_keys
from ftcore.errors import DataError
from ftcore.settings import Role


class Source(TypedDict):
    """One source: its rows, its columns, how often its training rows are repeated, and how many are taken at most."""

    path: Annotated[str, Role(path="rows")]
    columns: dict[str, str]
    weight: Annotated[float, Gt(0)]
    max_rows: Annotated[int, Ge(1)] | None


@dataclass(frozen=True, kw_only=True)
class Mixture(Data):
    """A data set made of several. Each source is split on its own, and its rows have its name as `source`."""

    sources: dict[str, Source]

    def load(self, record_type: str) -> Records:
        """Rows of all sources. Raises `DataError` as each of them would, and for leakage between them."""
        if not self.sources:
            raise DataError("data=mixture needs sources: data.sources.<name>={path: rows.jsonl, weight: 1}.")
        parts = self._parts(record_type)
        rows: Parts = {s: [row for part in parts.values() for row in getattr(part, s)] for s in SPLITS}
        keys = question_keys(row for part in rows.values() for row in part)
        train, notes = self._compared(rows, keys, RECORD_TYPES[record_type])
        kept, weighted = {id(row) for row in train}, list[Row]()
        for name, part in parts.items():
            own = _weighted([row for row in part.train if id(row) in kept], self.sources[name]["weight"])
            weighted += own
            notes.append(f"{name}: {len(own):,} train ({len(part.train):,} different), {len(part.test):,} held out")
        of_parts = [f"{name}: {note}" for name, part in parts.items() for note in part.notes]
        return Records(record_type, weighted, rows["validation"], rows["test"], (*of_parts, *notes))

    def _parts(self, record_type: str) -> dict[str, Records]:
        """The rows of each source. Raises one `DataError` for all sources that cannot be read."""
        parts, wrong = dict[str, Records](), list[str]()
        for name, source in self.sources.items():
            try:
                parts[name] = self._part(name, source, record_type)
            except DataError as error:
                wrong.append(f"{name}: {error}".replace("data.columns", f"data.sources.{name}.columns"))
        if wrong:
            raise DataError("\n".join(wrong))
        return parts

    def _part(self, name: str, source: Source, record_type: str) -> Records:
        own = replace(self, path=source["path"], columns=source["columns"] or self.columns)
        part = Data.load(own, record_type)
        named = {s: [{**row, "source": name, "id": f"{name}/{row['id']}"} for row in getattr(part, s)] for s in SPLITS}
        if source["max_rows"]:  # those that come first by the hash of their text, so that new rows change little
            named["train"] = sorted(named["train"], key=lambda row: position(_text(row)))[: source["max_rows"]]
        return Records(record_type, named["train"], named["validation"], named["test"], part.notes)


def _weighted(rows: list[Row], weight: float) -> list[Row]:
    """Each row as often as `weight` says; for a fraction, the rows that come first by the hash of their text."""
    times = int(weight)
    copies = [{**row, "id": f"{row['id']}/{k}"} for k in range(1, times) for row in rows]
    extra = [{**row, "id": f"{row['id']}/+"} for row in rows if position(_text(row)) < weight - times]
    return [*(rows if times else []), *copies, *extra]


def _text(row: Row) -> str:
    return " ".join(str(row[column]) for column in sorted(row) if column not in {"id", "where", "source"})
