"""Reward functions: ftcore's own, and how others are checked and located.

A reward function follows TRL's convention, so functions written for TRL work here and the other way round:

    function(prompts, completions, completion_ids, **columns, **options) -> one number per completion

All arguments come by keyword: lists of texts, lists of token ids, the rows' other columns as parallel lists (None where a
row lacks the column), and the function's own options. A function names what it needs and ends in `**columns`. A completion is
excluded if its value is None or no finite number. Functions run in a worker process (rewards/worker.py) because they may
hang, crash or exit. Of what they raise only the type is reported, since rows may be private.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any

from ftcore.errors import ConfigError
from ftcore.rewards.answers import accepted_answers, is_right, last_number, letter, normalised

Function = Callable[..., Any]
Batch = dict[str, Sequence[object]]  # keyword arguments of a function, one entry per completion
Values = list[float | None]
Scored = tuple[Values, dict[str, Values]]  # the rewards of completions, and the values they are made of by name
TRL = "trl.rewards."


def exact_match(completions: list[str], **columns: Sequence[object]) -> Values:
    """1 when the completion is an accepted answer, case and punctuation aside, else 0; None for a row without one."""
    return _equal(completions, columns, normalised)


def contains_answer(completions: list[str], **columns: Sequence[object]) -> Values:
    """1 when the completion contains an accepted answer as whole words, else 0; None for a row without one."""
    answers = _answers(completions, columns)
    return [float(is_right(*pair)) if pair[1] else None for pair in zip(completions, answers, strict=True)]


def multiple_choice(completions: list[str], **columns: Sequence[object]) -> Values:
    """1 when the completion gives the answer's letter (`B`, `(B)`, `The answer is B.`), else 0; None without a letter."""
    return _equal(completions, columns, letter)


def numeric_answer(completions: list[str], **columns: Sequence[object]) -> Values:
    """1 when the completion's last number equals the answer's (1,234.5 or #### -7), else 0; None without a number."""
    return _equal(completions, columns, last_number)


def length(completions: list[str], *, limit: int, **columns: Sequence[object]) -> Values:
    """0 up to `limit` words, then falling evenly to -1 at twice as many; never None."""
    if limit <= 0:
        raise ValueError("limit must be above 0")
    return [max(-1.0, min(0.0, 1 - len(text.split()) / limit)) for text in completions]


def repetition(completions: list[str], *, n: int = 3, **columns: Sequence[object]) -> Values:
    """Minus the share of runs of `n` words that came before, in [-1, 0]; never None."""
    if not isinstance(n, int) or n < 1:
        raise ValueError("n must be a whole number above 0")
    words = [text.lower().split() for text in completions]
    runs = [[tuple(row[k : k + n]) for k in range(len(row) - n + 1)] for row in words]
    return [len(set(row)) / len(row) - 1 if row else 0.0 for row in runs]


def format(completions: list[str], *, pattern: str, **columns: Sequence[object]) -> Values:
    """1 when the regular expression `pattern` matches the whole completion (a dot also a line break), else 0; never None."""
    expression = re.compile(pattern, re.DOTALL)
    return [float(expression.fullmatch(text) is not None) for text in completions]


def _equal(completions: list[str], columns: Batch, reduce: Callable[[str], object]) -> Values:
    """1 where `reduce` gives the same for a completion and an accepted answer, else 0; None where it gives no answer."""
    answers = [{reduce(answer) for answer in row} - {None} for row in _answers(completions, columns)]
    pairs = zip(completions, answers, strict=True)
    return [float(reduce(text) in right) if right else None for text, right in pairs]


def _answers(completions: list[str], columns: Batch) -> list[list[str]]:
    """The accepted answers of each row."""
    absent = [None] * len(completions)
    pairs = zip(columns.get("answer", absent), columns.get("completion", absent), strict=True)
    return [accepted_answers({"answer": answer, "completion": completion}) for answer, completion in pairs]


OWN = (exact_match, contains_answer, multiple_choice, numeric_answer, length, repetition, format)
FUNCTIONS: dict[str, Function] = {function.__name__: function for function in OWN}


def check_reward(name: str, options: dict[str, object], trust: list[str]) -> None:
    """Raise `ConfigError` for a reward with a wrong name or wrong options. Imports nothing for it."""
    if name in FUNCTIONS:
        _check_options(name, options)
    elif "." not in name:
        match = get_close_matches(name, FUNCTIONS, n=1, cutoff=0.5)
        raise ConfigError(
            f"There is no reward {name!r}{f'; did you mean {match[0]!r}?' if match else '.'} ftcore has {', '.join(FUNCTIONS)}; "
            f"a function of your own is named with its module, as in my_package.{name}, and trust=[my_package]."
        )
    elif name.rpartition(".")[0] == TRL.rstrip("."):
        if find_spec("trl") is None:
            raise ConfigError(f"Reward {name!r} needs TRL: pip install 'ftcore[trl]'.")
    elif not any(name.startswith(f"{module}.") for module in trust):
        raise ConfigError(f"Reward {name!r} is not ftcore's code. If you trust it, add trust=[{name.split('.')[0]}].")


def _check_options(name: str, options: dict[str, object]) -> None:
    function = FUNCTIONS[name]
    known = inspect.getfullargspec(function).kwonlyargs
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"Reward {name!r} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}.")
    try:
        function([], **options)
    except Exception as error:
        raise ConfigError(f"Reward {name!r}: {error}.") from None


def locate_reward(name: str, trust: list[str]) -> Function:
    """The function of that name: ftcore's own, or imported from TRL or a trusted module. Raises `ConfigError`."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    check_reward(name, {}, trust)
    try:
        function = resolve_name(":".join(name.rsplit(".", 1)))
    except (Exception, SystemExit) as error:
        raise ConfigError(f"Reward {name!r} cannot be imported: {type(error).__name__}: {error}.") from None
    if not callable(function):
        raise ConfigError(f"Reward {name!r} is not a function.")
    return function
