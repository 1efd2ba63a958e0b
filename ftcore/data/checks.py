"""What makes a row right: text where text belongs, turns in order, no characters that print nothing.

Every error names the file, the line and the column, never what stands there.
"""

import re
from typing import Any

from ftcore.data.formats import Row
from ftcore.errors import DataError

# Control characters of ASCII other than tab and line breaks.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
MESSAGES = 'Messages look like [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'


def check_row(row: Row, required: tuple[str, ...], columns: dict[str, str], raw: Row) -> None:
    """Raise `DataError` unless a row has its required columns, and rightly what it may have beside them.

    `columns` names them in the `raw` row, as messages should.
    """
    where = row["where"]
    for column in required:
        source = columns.get(column, column)
        if column not in row:
            raise DataError(
                f"{where}: there is no column {source!r}; the row has {', '.join(sorted(raw))}. Say which column holds the "
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


def check_characters(row: Row, required: tuple[str, ...]) -> None:
    """Raise `DataError` for a control character in a required column or a message."""
    texts = [(column, row[column]) for column in required if column != "label"]
    texts += [(f"message {k}", message["content"]) for k, message in enumerate(row.get("messages", ()), 1)]
    for name, text in texts:
        if found := CONTROL.search(text):
            raise DataError(
                f"{row['where']}: {name} holds a control character (U+{ord(found[0]):04X}) at character {found.start() + 1}. "
                "Remove it, or keep such text with data.control_characters=allow."
            )


def check_messages(messages: Any, where: str) -> Row:
    """Prompt and completion of a conversation: its last question and answer.

    Raises `DataError` unless an optional system message is followed by user and assistant in turn, the assistant last.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{where}: messages must be a list of objects. {MESSAGES}")
    for k, message in enumerate(messages, 1):
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise DataError(f"{where}: message {k} has no text in 'content'. {MESSAGES}")
    roles = [message.get("role") for message in messages]
    if set(map(str, roles)) - {"system", "user", "assistant"}:
        raise DataError(f"{where}: a role is not one of system, user, assistant. {MESSAGES}")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(
            f"{where}: after at most one system message, user and assistant must take turns and the assistant end; the roles "
            f"are {', '.join(roles)}."
        )
    return {"prompt": messages[-2]["content"], "completion": messages[-1]["content"]}
