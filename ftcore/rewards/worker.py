"""The worker process that runs reward functions, under a time limit: they may hang, crash or exit."""

import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe, connection, get_context, process

from ftcore.console import stderr, steady_streams
from ftcore.errors import ConfigError, RewardError, described, is_private, traced
from ftcore.machine import isolated
from ftcore.rewards.functions import FUNCTIONS, TRL, Batch, Function, Scored, Values, check_reward, locate_reward

Outcome = float | str  # the value of one completion, or why it has none

START_LIMIT = 300  # seconds for importing the functions' modules
ROWS_TO_JUDGE = 16  # the fraction of failures among fewer rows says little


class Rewards:
    """Weighted reward functions in a worker process, which starts at the first use and again after it was killed.

    `options`: keyword options by function; `time_limit`: seconds for one function on one batch; `max_failed_share`: the
    largest fraction of rows that a function may leave without a number; `trust`: modules whose functions may run.
    `seen` counts rows, `failed` those without a number by function, `reasons` holds the last reason for it.
    Use it from one thread that stays: the worker ends with the thread that started it.
    """

    def __init__(
        self, names: list[str], weights: list[float], options: dict[str, dict[str, object]], *, time_limit: float,
        max_failed_share: float, trust: list[str],
    ) -> None:  # fmt: skip
        if not len(weights) == len(names) == len(set(names)):
            counts = f"{len(names)} rewards ({len(set(names))} different) and {len(weights)} weights"
            raise ConfigError(f"Name each reward once, and as many weights; given are {counts}.")
        if unused := sorted(set(options) - set(names)):
            raise ConfigError(f"Options for {', '.join(unused)}, but the rewards are: {', '.join(names) or 'none'}.")
        for name in names:
            check_reward(name, options.get(name, {}), trust)
        self.weights, self.time_limit, self.max_failed_share = weights, time_limit, max_failed_share
        self.seen, self.failed, self.reasons = 0, Counter[str](), dict[str, str]()
        self._functions = {name: (options.get(name, {}), trust) for name in names}
        self._worker: tuple[process.BaseProcess, connection.Connection] | None = None

    def score(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], rows: list[dict[str, object]]
    ) -> Scored:
        """Weighted sums, None where a function gave no number, and each function's values by its name.

        Raises `RewardError` once a function has failed for more than the allowed fraction of all rows seen.
        """
        assert len(prompts) == len(completions) == len(completion_ids) == len(rows)
        batch: Batch = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        columns = dict.fromkeys(key for row in rows for key in row if key not in {"prompt", *batch})
        batch |= {key: [row.get(key) for row in rows] for key in columns}
        values: dict[str, Values] = {}
        self.seen += len(rows)
        for name in self._functions:
            outcomes = self._outcomes(name, batch)
            self._count_failures(name, outcomes)
            values[name] = [None if isinstance(outcome, str) else outcome for outcome in outcomes]
        return [self._total([column[k] for column in values.values()]) for k in range(len(rows))], values

    def close(self) -> None:
        """End the worker, and what it started, at once."""
        if self._worker:
            worker, pipe = self._worker
            isolated.end(worker)
            pipe.close()
            self._worker = None

    def _total(self, values: Values) -> float | None:
        terms = [weight * value for weight, value in zip(self.weights, values, strict=True) if value is not None]
        return float(sum(terms)) if len(terms) == len(values) else None

    def _count_failures(self, name: str, outcomes: list[Outcome]) -> None:
        reasons = [outcome for outcome in outcomes if isinstance(outcome, str)]
        self.failed[name] += len(reasons)
        self.reasons.update((name, reason) for reason in reasons)  # the last one stays
        judged = self.seen >= ROWS_TO_JUDGE or len(reasons) == len(outcomes)
        if judged and self.failed[name] > self.max_failed_share * self.seen:
            raise RewardError(
                f"Reward {name!r} gave no number for {self.failed[name]} of {self.seen} completions, a larger share than "
                f"{self.max_failed_share:g} (max_failed_share); the last reason: {self.reasons[name]}. ftcore's functions "
                f"return None for rows without a fitting `answer`; a function of your own must accept every column "
                f"(**columns) and return one number per completion, in time."
            )

    def _outcomes(self, name: str, batch: Batch) -> list[Outcome]:
        """Each completion's value by the function `name`, or why it has none."""
        if self._worker is None:
            self._start()
        reply = self._ask((name, batch), self.time_limit)
        return [reply] * len(batch["completions"]) if isinstance(reply, str) else reply

    def _start(self) -> None:
        """Start the worker and wait until it has imported the functions. Raises `ConfigError` when it cannot."""
        pipe, theirs = Pipe()
        with theirs, isolated.uninterrupted():
            self._worker = isolated.start(get_context("spawn"), _work, theirs, daemon=True), pipe
        reply = self._ask(self._functions, START_LIMIT)
        if isinstance(reply, str):
            self.close()
            raise ConfigError(f"The rewards cannot be loaded: {reply}.")

    def _ask(self, message: object, limit: float) -> list[Outcome] | str:
        """The worker's reply. If there is none in time, the worker is ended and the reason returned."""
        assert self._worker
        pipe, reply, reason = self._worker[1], None, f"time limit of {limit:g} s"
        try:
            pipe.send(message)
            reply = pipe.recv() if pipe.poll(limit) else None
        except (EOFError, OSError):
            reason = "the process that ran it ended"
        finally:  # also when interrupted: a late reply would be taken for that to the next message
            if reply is None:
                self.close()
        return reason if reply is None else reply


def _bound(name: str, options: dict[str, object], trust: list[str]) -> Function:
    """The function with its options, which replace columns of the same name. TRL's get conversations, others texts."""
    function = locate_reward(name, trust)
    if name in FUNCTIONS:
        options = {**(function.__kwdefaults__ or {}), **options}
    if name.startswith(f"{TRL}get_"):  # returns the reward function for its options
        try:
            function, options = function(**options), {}
        except Exception as error:
            raise ConfigError(f"Reward {name!r}: {error}.") from None
    if name.startswith(TRL):
        return lambda **batch: function(**{**_conversations(batch), **options})
    return lambda **batch: function(**{**batch, **options})


def _conversations(batch: Batch) -> Batch:
    roles = {"prompts": "user", "completions": "assistant"}
    return batch | {key: [[{"role": role, "content": text}] for text in batch[key]] for key, role in roles.items()}


def _work(pipe: connection.Connection) -> None:
    """The worker: import the functions, then answer batches until the parent is gone."""
    if is_private():  # functions may print rows
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)  # also of what they start
    steady_streams()
    sys.stdout = sys.stderr  # keeps what functions print out of the program's own output
    with suppress(EOFError, OSError):
        try:
            functions = {name: _bound(name, *settings) for name, settings in pipe.recv().items()}
        except ConfigError as error:
            return pipe.send(str(error).rstrip("."))
        pipe.send([])
        while True:
            name, batch = pipe.recv()
            pipe.send(_guarded(functions[name], batch))


def _guarded(function: Function, batch: Mapping[str, Sequence[object]]) -> list[Outcome]:
    """What a function returns for a batch. If it raises, it is called row by row, so that only rows that fail are excluded."""
    count = len(batch["completions"])
    try:
        return _checked(function(**batch), count)
    except BaseException as error:
        if count == 1:
            if os.environ.get("FTCORE_DEBUG"):
                stderr.print(traced(error))
            return [described(error)]
    rows = ({key: [column[k]] for key, column in batch.items()} for k in range(count))
    return [outcome for row in rows for outcome in _guarded(function, row)]


def _checked(values: object, count: int) -> list[Outcome]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple):
        return [f"returned {type(values).__name__}, no list"] * count
    if len(values) != count:
        return [f"returned {len(values)} values for {count} completions"] * count
    return list(map(_number_or_reason, values))


def _number_or_reason(value: object) -> Outcome:
    number = math.nan
    if hasattr(value, "__float__"):
        with suppress(Exception):  # a tensor of several numbers, an integer that is too large
            number = float(value)
    kind = "None" if value is None else type(value).__name__
    return number if math.isfinite(number) else f"returned {kind}, no finite number"
