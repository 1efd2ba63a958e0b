"""What makes a row right: text where text belongs, no control characters.

Every error names the file, the line and the column, never what stands there.
"""

import re
from collections.abc import Iterable

from ftcore.data.formats import Row
from ftcore.data.shapes import CONTEXT, SHAPES, SIDES, SWITCH_COLUMNS
from ftcore.errors import DataError, is_private

# Names of columns that a message may show: a file without a header has a row's texts for names.
NAME = re.compile(r"[^\W\d][\w.:/-]{0,39}")
# Names that mean something, whatever rows say. pandas writes a column without one.
MEANT = {"", "completion", "label", "text", *SIDES, *CONTEXT, *SWITCH_COLUMNS}
MEANT.update(column for shape in SHAPES for column in (*shape.columns, *shape.others))
# Methods by columns of rows that other methods do not take.
FITS = {"method=dpo": {"prompt", "chosen", "rejected"}, "method=self_supervised": {"text"}}
# Characters that print nothing: controls other than tab and line breaks, spaces and operators without width, marks that turn the
# direction, of notes, and tags, which spell words that only a model reads. What joins or parts letters, a word at a line's end
# or emoji (U+00AD, U+200C to U+200F, U+FE0F, the tags of flags) belongs to texts.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u180e\u200b\u2060-\u2064\ufeff\u202a-\u202e\u2066-\u206f\ufff9-\ufffb]"
    "|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]"
)
# Letters without a shape, and joiners: a text of these alone is empty.
SHAPELESS = re.compile("[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u200c-\u200f\u2800\u3164\ufe00-\ufe0f\uffa0]")


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
                f"{row['where']}: there is no column {source!r}; the row has {named(raw)}. {fitting} which column holds "
                f"the {column}: data.columns.{column}=<name>."
            )


def named(columns: Iterable[str], most: int = 20) -> str:
    """Names of columns as a message may show them; of private rows only those that mean something here."""
    names = sorted(columns)
    may = [name for name in names if name in MEANT or (not is_private() and NAME.fullmatch(name))]
    # Where one is no name, the others may be a row's texts too.
    shown = [name or "one without a name" for name in may if len(may) == len(names) or name in MEANT][:most]
    hidden = len(names) - len(shown)
    return " and ".join(
        [*([", ".join(shown)] if shown else []), *([f"{hidden:,} whose names are not shown"] if hidden else [])]
    )


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
    return "is empty" if isinstance(value, str) and _is_empty(value) else ""


def _is_empty(text: str) -> bool:
    if text[:1].isalnum() and text[0].isascii():  # almost every text, and quickly told
        return False
    return not SHAPELESS.sub("", INVISIBLE.sub("", text)).strip()


def check_characters(row: Row, required: tuple[str, ...]) -> None:
    """Raise `DataError` for a character that prints nothing in a required column or a message."""
    texts = [(column, row[column]) for column in required if column != "label"]
    texts += [(f"message {k}", message["content"]) for k, message in enumerate(row.get("messages", ()), 1)]
    for name, text in texts:
        if not text.isprintable() and (found := INVISIBLE.search(text)):
            raise DataError(
                f"{row['where']}: {name} holds a character that prints nothing (U+{ord(found[0]):04X}) at character "
                f"{found.start() + 1}. Remove it, or keep such text with data.control_characters=allow."
            )
