"""Diagnoses and the chapter of ICD-10-CM that each is coded in: `data=icd10`, short questions whose answers can be checked.

The classification is the work of the US National Center for Health Statistics at the CDC and in the public domain. The
package simple-icd-10-cm, which contains it, has the MIT licence. S72.0 (fracture of head and neck of femur) belongs to the
category S72, and that to chapter 19. Categories have three characters, codes below them up to seven. Subcategories often
differ in a word or two, so the rows of a category have the same `group`, and a split keeps them on one side.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from ftcore.data.records import Data
from ftcore.data.sources import Paths, Row, Split
from ftcore.data.splits import normalised, position
from ftcore.errors import ConfigError, DataError

PACKAGED = "data=icd10"  # stands for the packaged classification where rows have a path
QUESTION = "In which ICD-10-CM chapter is this coded: {}?"
Entry = tuple[str, str, str]  # code, description, chapter


@dataclass(frozen=True, kw_only=True)
class ICD10(Data):
    """A row for each of some codes of every chapter, with the columns of all record types and the code's `description`."""

    depth: Annotated[int, Ge(3), Le(7)]
    max_per_chapter: Annotated[int, Ge(1)] | None

    def read(self, path: Paths, record_type: str) -> Iterator[tuple[str, Row | DataError]]:
        """(where, row) in the order of a hash of the codes, so that the first rows are of all chapters."""
        if path != PACKAGED:
            yield from super().read(path, record_type)
            return
        entries = sorted(_entries(self.depth), key=lambda entry: position(f"row {entry[0]}"))
        chapters = sorted({chapter for _, _, chapter in entries})
        counts = Counter[str]()
        for code, description, chapter in entries:
            counts[chapter] += 1
            if self.max_per_chapter is None or counts[chapter] <= self.max_per_chapter:
                others = [title for title in chapters if title != chapter]
                yield f"icd10:{code}", _row(code, description, chapter, others)

    def _files(self, record_type: str) -> dict[Split, Paths | None]:
        return super()._files(record_type) if self.has_files else {"train": PACKAGED}


def _row(code: str, description: str, chapter: str, others: list[str]) -> Row:
    """Only the full title is right: parts of it ("nervous system") also stand in titles of other chapters."""
    wrong = others[int(position(f"rejected {code}") * len(others))]
    columns = {"prompt": QUESTION.format(description), "completion": chapter, "chosen": chapter, "rejected": wrong}
    return {"id": code, "group": code[:3], "description": description, "answer": [chapter], **columns}


def _entries(depth: int) -> list[Entry]:
    """Codes of up to `depth` characters; of those with the same description the shortest, of these the first.

    The first import of the package takes seconds. Raises `ConfigError` where it is not installed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            import simple_icd_10_cm as icd
    except ModuleNotFoundError:
        raise ConfigError("data=icd10 needs the package simple-icd-10-cm: pip install 'ftcore[icd10]'.") from None
    codes = {code for code in icd.get_all_codes() if len(code.replace(".", "")) <= depth}  # some come twice
    entries: dict[str, Entry] = {}
    for code in sorted(filter(icd.is_category_or_subcategory, codes), key=lambda code: (len(code), code)):
        description = icd.get_description(code)
        chapter = icd.get_description(icd.get_ancestors(code)[-1])  # "Neoplasms (C00-D49)"
        entries.setdefault(normalised(description), (code, description, chapter.rpartition(" (")[0]))
    return list(entries.values())
