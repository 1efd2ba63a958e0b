"""Columns of a file that stand for ours: another name, a template of several columns, text that stands for a number."""

import re
from collections.abc import Callable
from contextlib import suppress
from math import isfinite

from ftcore.data.formats import Row
from ftcore.data.messages import ON
from ftcore.errors import DataError

# Columns that text files hold as text.
UNTYPED = {"label", "kto_tag", "margin"}
FIELD = re.compile(r"\{(\w+(?:\.\w+)*)\}")


def columns_in(source: str) -> list[str]:
    """The columns that a column's source takes: itself, or those that a template names."""
    return [found.partition(".")[0] for found in FIELD.findall(source)] or [source]


def filled(source: str) -> Callable[[Row], object]:
    """Takes a column's value, or fills a template: `{name}` is a column, `{name.key}` what is inside it."""
    if not FIELD.search(source):
        return lambda raw: raw.get(source)
    return lambda raw: FIELD.sub(lambda found: _inside(raw, found[1].split(".")), source)


def _inside(value: object, path: list[str]) -> str:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise DataError(f"data.columns: a template names {'.'.join(path)!r}, which a row does not have.")
        value = value[key]
    inside = value if isinstance(value, list) else [value]
    if any(one is None or isinstance(one, dict | list) for one in inside):
        kind = "null" if None in inside else "an object" if value is inside[0] else "a list of more than texts"
        raise DataError(f"data.columns: a template names {'.'.join(path)!r}, which holds {kind}.")
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def typed_columns(row: Row) -> Row:
    """Labels and margins of files that hold text alone, or zeros and ones."""
    label, margin = row.get("label", row.get("kto_tag")), row.get("margin")
    typed: Row = {}
    known = label.lower() if isinstance(label, str) else label
    if isinstance(known, str | int | float) and known in ON:
        typed["label"] = ON[known]
    elif label is not None:
        typed["label"] = label
    if isinstance(margin, str):
        with suppress(ValueError):
            typed["margin"] = float(margin) if isfinite(float(margin)) else margin
    return typed
