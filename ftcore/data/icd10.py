"""Diagnoses and the chapter of ICD-10-CM that each is coded in: `data=icd10`, short questions whose answers can be checked.

The classification is the work of the US National Center for Health Statistics at the CDC and in the public domain; the
package simple-icd-10-cm, which holds it, has the MIT licence. S72.0 (fracture of head and neck of femur) belongs to the
category S72, and that to chapter 19. Categories have three characters, codes below them up to seven. Subcategories often
differ in a word or two, so a category's rows have one `group`, and a split never parts them.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Le

from ftcore.data.formats import Row
from ftcore.data.records import Data
from ftcore.data.splits import normalised, position
from ftcore.errors import ConfigError, DataError

MADE = "data=icd10"  # where the rows come from when no file of them is named
QUESTION = "In which ICD-10-CM chapter is this coded: {}?"


class Entry(NamedTuple):
    """A code, what it stands for, and its chapter."""

    code: str
    description: str
    chapter: str


@dataclass(frozen=True, kw_only=True)
class ICD10(Data):
    """A row for each of some codes of every chapter. It has the columns of all record types, and its `description`."""

    depth: Annotated[int, Ge(3), Le(7)]
    max_per_chapter: Annotated[int, Ge(1)] | None

    def read(self, path: str) -> Iterator[tuple[str, Row | DataError]]:
        """(where, row) in the order of a hash of the codes, so that the first rows are of all chapters."""
        if path != MADE:
            yield from super().read(path)
            return
        entries = sorted(_entries(_package(), self.depth), key=lambda entry: position(f"row {entry.code}"))
        chapters = sorted({entry.chapter for entry in entries})
        counts = Counter[str]()
        for entry in entries:
            counts[entry.chapter] += 1
            if self.max_per_chapter is None or counts[entry.chapter] <= self.max_per_chapter:
                yield f"icd10:{entry.code}", _row(entry, chapters)

    def _files(self, record_type: str) -> dict[Any, Any]:
        copied = self.path or any(self.splits.values())
        return super()._files(record_type) if copied else {"train": MADE}


def _row(entry: Entry, chapters: list[str]) -> Row:
    """Only the whole title is right: parts of it ("nervous system") also name what other chapters hold."""
    code, description, chapter = entry
    others = [title for title in chapters if title != chapter]
    wrong = others[int(position(f"rejected {code}") * len(others))]
    columns = {"prompt": QUESTION.format(description), "completion": chapter, "chosen": chapter, "rejected": wrong}
    return {"id": code, "group": code[:3], "description": description, "answer": [chapter], **columns}


def _entries(icd: ModuleType, depth: int) -> list[Entry]:
    """Codes of up to `depth` characters. Of those that ask the same question the shortest stays, of these the first."""
    codes = {code for code in icd.get_all_codes() if len(code.replace(".", "")) <= depth}  # some come twice
    found: dict[str, Entry] = {}
    for code in sorted(filter(icd.is_category_or_subcategory, codes), key=lambda code: (len(code), code)):
        description = icd.get_description(code)
        chapter = icd.get_description(icd.get_ancestors(code)[-1])  # "Neoplasms (C00-D49)"
        found.setdefault(normalised(description), Entry(code, description, chapter.rpartition(" (")[0]))
    return list(found.values())


def _package() -> ModuleType:
    """The classification, read when it is first imported: seconds. Raises `ConfigError` where it is not installed."""
    try:
        with warnings.catch_warnings(action="ignore"):
            import simple_icd_10_cm
    except ModuleNotFoundError:
        raise ConfigError("data=icd10 needs the package simple-icd-10-cm: pip install 'ftcore[icd10]'.") from None
    return simple_icd_10_cm
