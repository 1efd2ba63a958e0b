"""The rows of every optimizer step, a function of seed, epoch, position and lengths alone, and their micro-batches."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import chain, count, islice
from math import ceil
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ftcore.data.layouts import Batch, T
from ftcore.data.token_cache import lengths
from ftcore.data.tokens import Example


class Trainable(Protocol):
    """What steps are made of: an example, a pair of them, or a completion with its reward."""

    def __len__(self) -> int: ...

    @property
    def trained(self) -> int:
        """Number of tokens with loss."""

    @property
    def truncated(self) -> bool:
        """Whether it was cut."""


E = TypeVar("E", bound=Trainable)
# Draws the rows of the next step, of which a method's `prepare` makes what it trains on: the rows, or completions of them.
Draw = Callable[[], list[Any]]
# Steps whose rows are sorted by length together: fewer padding tokens, order still random across windows.
WINDOW = 16


def steps_of_epoch(lengths: Sequence[int], global_batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row numbers of each step of an epoch: shuffled, then alike lengths together within windows, then shuffled steps."""
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths))
    window = WINDOW * global_batch_size
    by_length = [
        part[np.argsort([lengths[row] for row in part], kind="stable")]
        for part in np.split(shuffled, range(window, len(shuffled), window))
    ]
    steps = np.array_split(np.concatenate(by_length), ceil(len(lengths) / global_batch_size))
    return [steps[k] for k in random.permutation(len(steps))]


class TrainBatches(Generic[E]):
    """The micro-batches of a whole run for one process; accumulation is their number per step.

    Args:
        examples: rows to train on.
        collate: a list of examples to one batch of tensors; an empty list gives a batch without loss.
        counts: an example's contribution to the counts that loss terms are divided by.
        prepare: what to train on in a step, given a function that draws its rows and a random generator that is the same in
            every process (default: the rows).
        collate_text: `collate` of the general text (default: the same).
        arrange: the rows of a step as micro-batches and processes take their shares (default: the longest first).
        retention: general text, `retention_rows` of it beside the rows of every `retention_every`-th step (none: no such term).
        steps: optimizer steps of the run.
        updates: optimizer steps on what one call of `prepare` returned.
    """

    def __init__(
        self,
        examples: Sequence[Sized],
        collate: Callable[[list[E]], Batch],
        counts: Callable[[E], dict[str, int]],
        retention: Sequence[Example] = (),
        prepare: Callable[[Draw, np.random.Generator], list[E]] = lambda draw, _: draw(),
        collate_text: Callable[[list[Example]], Batch] | None = None,
        arrange: Callable[[list[E]], list[E]] | None = None,
        *,
        retention_rows: int,
        retention_every: int,
        steps: int,
        updates: int = 1,
        rows_per_step: int | None = None,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.examples, self.collate, self.counts, self.steps = examples, collate, counts, steps
        self.collate_text: Callable[[list[Any]], Batch] = collate_text or collate
        self.arrange = arrange or longest_first
        self.prepare, self.updates, self.rows_per_step = prepare, updates, rows_per_step or global_batch_size
        self.retention, self.retention_rows, self.retention_every = retention, retention_rows, retention_every
        self.global_batch_size, self.micro_batch_size, self.seed = global_batch_size, micro_batch_size, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0
        self.first_step, self.draws = 0, 0
        self.accumulation = global_batch_size // (micro_batch_size * world_size)

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def start(self, step: int, draws: int) -> None:
        """Begin after `step` steps, for which rows were drawn `draws` times (resampling draws more often)."""
        self.first_step, self.draws = step, draws

    def __iter__(self) -> Iterator[Batch]:
        sizes = lengths(self.examples)
        shown = ceil(self.first_step / self.retention_every) * self.retention_rows
        general = _forever(self._general, len(self.retention), shown)
        draws = ceil(len(sizes) / self.rows_per_step)
        order = _forever(lambda epoch: steps_of_epoch(sizes, self.rows_per_step, self.seed, epoch), draws, self.draws)
        prepared: list[E] = []
        for step in range(self.first_step, self.steps):
            if step % self.updates == 0:
                random = np.random.default_rng([self.seed, step, 2])
                prepared = self.prepare(lambda: self._drawn(next(order), draws), random)
            due = self.retention and step % self.retention_every == 0
            kept = [self.retention[row] for row in islice(general, self.retention_rows)] if due else []
            yield from self._micro_batches(prepared, kept)

    def _general(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.retention))

    def _drawn(self, rows: np.ndarray, draws_of_epoch: int) -> list[Any]:
        self.epoch, self.draws = self.draws // draws_of_epoch, self.draws + 1
        return [self.examples[row] for row in rows]

    def _micro_batches(self, rows: list[E], retention: list[Example]) -> Iterator[Batch]:
        totals: Counter[str] = Counter(retention=sum(sum(example.completion_mask) for example in retention))
        for row in rows:
            totals.update(self.counts(row))
        rows = self.arrange(rows)
        for k in range(self.accumulation):
            share = k * self.world_size + self.rank
            mine = _share(rows, share, self.micro_batch_size)
            batch = self.collate(mine)
            batch["counts"], batch["row_counts"] = dict(totals), [self.counts(row) for row in mine]
            batch["epoch"], batch["facts"] = self.epoch, [(row.trained, row.truncated) for row in mine]
            general = _share(retention, share, ceil(len(retention) / (self.accumulation * self.world_size)))
            # With several processes each takes part in every forward pass, if only with a masked token.
            if general or (retention and self.world_size > 1):
                batch["retention"] = self.collate_text(general)
            yield batch


def longest_first(rows: list[E]) -> list[E]:
    """Rows by length, so that those side by side need little padding."""
    return sorted(rows, key=lambda row: -len(row))


def _share(rows: list[T], number: int, size: int) -> list[T]:
    return rows[number * size : (number + 1) * size]


def _forever(items_of_epoch: Callable[[int], Iterable[T]], size: int, start: int) -> Iterator[T]:
    """Items of all epochs, `size` in each, from number `start` on."""
    first = start // max(size, 1)
    return islice(chain.from_iterable(items_of_epoch(epoch) for epoch in count(first)), start - first * size, None)
