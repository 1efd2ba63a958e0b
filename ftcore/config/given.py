"""Text on a command line, such as a path: taken as the shell gives it, whatever it holds.

Hydra has a grammar of its own for values. What it would read as anything else is quoted for it here.
"""

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from ftcore.config.roles import is_text

QUOTED = r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""


def quoted(text: str) -> str:
    """Text as a value of an override."""
    return QuotedString(text, Quote.double).with_quotes()


def as_given(word: str, several: bool = False) -> str:
    """`key=value` as an override; the value of a key that is text is taken as it is.

    Quotes around all of it, and `null`, stay Hydra's. With `several`, in a sweep, commas outside of such quotes separate values.

    >>> as_given("data.path=my rows (1).jsonl"), as_given("run=a,b"), as_given("run=a,b", several=True)
    ('data.path="my rows (1).jsonl"', 'run="a,b"', 'run=a,b')
    """
    key, _, text = word.partition("=")
    if not is_text(key.lstrip("+")):
        return word
    override = _read(word)
    if several and override and override.is_sweep_override() and not _is_list(override):
        return word  # choice(a,b)
    values = re.findall(rf"({QUOTED}|[^,]+)(?:,|$)", text) if several else [text]
    return f"{key}={','.join(_as_text(value.strip() if several else value) for value in values)}"


def _as_text(text: str) -> str:
    """A value that Hydra reads as this text; what has quotes or is null is left to it."""
    override = _read(f"key={text}")
    if not override or override.is_sweep_override():
        return quoted(text)
    value, is_quoted = override.value(), re.fullmatch(QUOTED, text)
    is_same = value == text and not re.search(r"\s", text)
    return text if value is None or is_quoted or is_same else quoted(text)


def _is_list(override: Override) -> bool:
    """Whether its values are just separated by commas."""
    value = override.value()
    return isinstance(value, ChoiceSweep) and value.simple_form


def _read(word: str) -> Override | None:
    """A word as Hydra reads it, None if it cannot."""
    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, ValueError):
        return None
