"""What makes a row right: text where text belongs, no control characters.

Every error names the file, the line and the column, never what stands there.
"""

import re

from ftcore.data.formats import Row
from ftcore.errors import DataError

# Names of columns that a message may show.
NAME = re.compile(r"[\w .:/-]{1,40}")
# Methods by columns of rows that other methods do not take.
FITS = {"method=dpo": {"prompt", "chosen", "rejected"}, "method=self_supervised": {"text"}}
# Characters that print nothing: controls of ASCII other than tab and line breaks, spaces without width, marks of direction. Those
# that join or part letters (U+200C, U+200D) belong to Persian, Indian scripts and emoji.
INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]")


def check_row(row: Row, required: tuple[str, ...], columns: dict[str, str], raw: Row) -> None:
    """Raise `DataError` when a required column is missing, or a column has the wrong type or is empty.

    The `raw` row is as the file has it. `columns` maps our names of columns to its own, which messages use.
    """
    for column in (*required, "answer", "margin"):
        source = columns.get(column, column)
        if column in row and (problem := _problem(column, row[column])):
            raise DataError(f"{row['where']}: column {source!r} {problem}. Correct or remove the row.")
        if column not in row and column in required:
            fitting = next(
                (f"On such rows {method} trains. Or say" for method, has in FITS.items() if row.keys() >= has), "Say"
            )
            raise DataError(
                f"{row['where']}: there is no column {source!r}; the row has {_named(raw)}. {fitting} which column holds "
                f"the {column}: data.columns.{column}=<name>."
            )


def _named(raw: Row) -> str:
    """The columns of a row; a file without a header has a row's texts for names."""
    shown = [name for name in sorted(raw) if NAME.fullmatch(name)][:20]
    others = len(raw) - len(shown)
    return ", ".join(shown) + f"{' and ' * bool(shown)}{others:,} others" * bool(others)


def _problem(column: str, value: object) -> str:
    """What is wrong with the value of a column; "" for nothing."""
    if column == "answer":
        is_right = all(isinstance(text, str) for text in (value if isinstance(value, list) else [value]))
        return "" if is_right else "must be text or a list of texts that count as right"
    if column == "margin":
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
        return "" if is_number else "must be a number below 1e30"
    kind, wanted = (bool, "true or false, 1 or 0, or named by data.values") if column == "label" else (str, "text")
    if not isinstance(value, kind):
        return f"must be {wanted}, not {'null' if value is None else type(value).__name__}"
    return "" if not isinstance(value, str) or INVISIBLE.sub("", value).strip() else "is empty"


def check_characters(row: Row, required: tuple[str, ...]) -> None:
    """Raise `DataError` for a character that prints nothing in a required column or a message."""
    texts = [(column, row[column]) for column in required if column != "label"]
    texts += [(f"message {k}", message["content"]) for k, message in enumerate(row.get("messages", ()), 1)]
    for name, text in texts:
        if found := INVISIBLE.search(text):
            raise DataError(
                f"{row['where']}: {name} holds a character that prints nothing (U+{ord(found[0]):04X}) at character "
                f"{found.start() + 1}. Remove it, or keep such text with data.control_characters=allow."
            )
