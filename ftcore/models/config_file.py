"""config.json of a model, which anybody may have written: its numbers, before a network is built from them."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftcore.config.tree import flatten
from ftcore.errors import ModelError, model_errors, printable

# Keys that count what is built one by one, before any weight is read, and how many of each may be.
BUILT_ONE_BY_ONE, MOST = re.compile(r"(layers?|experts?|labels?)$"), 4096


def check_config(folder: Path) -> None:
    """Refuse numbers that no model has: they would give another model, no end or no memory."""
    for key, value in _numbers(folder):
        wrong = ""
        if not abs(value) < math.inf:
            wrong = "which is no finite number"
        elif "drop" in key and not 0 <= value < 1:
            wrong = "and a share that is dropped is at least 0 and below 1"
        elif BUILT_ONE_BY_ONE.search(key) and value > MOST:
            wrong = f"and more than {MOST:,} are not built"
        if wrong:
            raise ModelError(f"{_file(folder)}: {printable(key)} is {printable(str(value), 40)}, {wrong}.")


def check_signs(config: Any, folder: Path) -> None:
    """Refuse a negative number where the architecture's own is not: a size, a length, a rate. `config` is transformers'."""
    usual = dict(_numbers_in(type(config)().to_dict()))
    for key, value in _numbers_in(config.to_dict()):
        if value < 0 <= usual.get(key, -1):
            raise ModelError(f"{_file(folder)}: {printable(key)} is {value}, and cannot be negative.")


def below_one(folder: Path) -> str:
    """The whole numbers below 1, but ids: what to look at when no model can be built."""
    odd = [
        f"{key}={value}" for key, value in _numbers(folder) if type(value) is int and value < 1 and key[-3:] != "_id"
    ]
    return f" ({_file(folder).name}: {printable(', '.join(odd))})" if odd else ""


def _file(folder: Path) -> Path:
    return folder / "config.json"


def _numbers(folder: Path) -> list[tuple[str, float]]:
    """(dotted key, value) of every number in the file."""
    with model_errors(_file(folder)):
        return list(_numbers_in(json.loads(_file(folder).read_text(encoding="utf-8"))))


def _numbers_in(settings: object) -> Iterator[tuple[str, float]]:
    for key, value in flatten(settings, in_lists=True):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
