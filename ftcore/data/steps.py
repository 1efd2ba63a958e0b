"""The rows of every optimizer step and their micro-batches.

The rows of a step depend on seed, epoch, position and lengths alone. They are sorted by length, cut into micro-batches and
dealt to the processes in turn.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import KW_ONLY, dataclass
from itertools import chain, count, islice
from math import ceil
from typing import Any, Generic, TypeVar

import numpy as np

from ftcore.data.examples import Example, Pair
from ftcore.data.layouts import Batch, T
from ftcore.data.token_cache import lengths

E = TypeVar("E", bound=Example | Pair)  # what a step trains on; completions with rewards are examples too
# Returns the rows of the next step. From them a method's `prepare` makes what it trains on: the rows, or completions of them.
Draw = Callable[[], list[Any]]
# Steps whose rows are sorted by length together: fewer padding tokens, order still random across windows.
WINDOW = 16


def steps_of_epoch(lengths: Sequence[int], global_batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row numbers of each step of an epoch: shuffled, then sorted by length within windows, then the steps shuffled."""
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths))
    windows = np.split(shuffled, range(WINDOW * global_batch_size, len(shuffled), WINDOW * global_batch_size))
    by_length = [window[np.argsort([lengths[row] for row in window], kind="stable")] for window in windows]
    steps = np.array_split(np.concatenate(by_length), ceil(len(lengths) / global_batch_size))
    return [steps[k] for k in random.permutation(len(steps))]


def longest_first(rows: list[E]) -> list[E]:
    """Rows by length, so that neighbours need little padding."""
    return sorted(rows, key=lambda row: -len(row))


@dataclass(eq=False)
class TrainBatches(Generic[E]):
    """The micro-batches of all steps of a run, for one process.

    A step is up to `global_batch_size` rows: the remainder of an epoch is spread over its steps, so that none is much smaller.

    Args:
        examples: rows to train on.
        collate: a list of examples to one batch of tensors; an empty list gives a batch without loss.
        counts: an example's contribution to the counts that loss terms are divided by.
        collate_text: `collate` of the general text.
        retention: general text, `retention_rows` of it beside the rows of every `retention_every`-th step (empty: none).
        prepare: what to train on in a step, given a function that draws its rows and a random generator that is the same in
            every process (default: the rows).
        arrange: the rows of a step in the order in which micro-batches and processes take them (default: longest first).
        deal: the rows of a step, given which process trains on each, with what this process needs of them (default: the rows).
        steps: optimizer steps of the run.
        updates: optimizer steps on what one call of `prepare` returned.
        rows_per_step: rows that a step draws (default: `global_batch_size`).
    """

    examples: Sequence[Sized]
    collate: Callable[[list[E]], Batch]
    counts: Callable[[E], dict[str, int]]
    collate_text: Callable[[list[Example]], Batch]
    retention: Sequence[Example] = ()
    prepare: Callable[[Draw, np.random.Generator], list[E]] = lambda draw, _: draw()
    arrange: Callable[[list[E]], list[E]] = longest_first
    deal: Callable[[list[E], list[int]], list[E]] = lambda rows, _: rows
    _: KW_ONLY
    retention_rows: int
    retention_every: int
    steps: int
    updates: int = 1
    rows_per_step: int | None = None
    global_batch_size: int
    micro_batch_size: int
    seed: int
    rank: int
    world_size: int
    epoch = first_step = draws = 0

    @property
    def accumulation(self) -> int:
        """Micro-batches of a process in each step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def start(self, step: int, draws: int) -> None:
        """Begin after `step` steps, for which rows were drawn `draws` times (resampling draws more often)."""
        self.first_step, self.draws = step, draws

    def __iter__(self) -> Iterator[Batch]:
        sizes, rows_per_step = lengths(self.examples), self.rows_per_step or self.global_batch_size
        draws = ceil(len(sizes) / rows_per_step)
        order = _forever(lambda epoch: steps_of_epoch(sizes, rows_per_step, self.seed, epoch), draws, self.draws)
        seen = ceil(self.first_step / self.retention_every) * self.retention_rows
        general = _forever(self._general, len(self.retention), seen)
        prepared: list[E] = []
        for step in range(self.first_step, self.steps):
            if step % self.updates == 0:
                random = np.random.default_rng([self.seed, step, 2])
                prepared = self.arrange(self.prepare(lambda: self._drawn(next(order), draws), random))
                processes = [k // self.micro_batch_size % self.world_size for k in range(len(prepared))]
                prepared = self.deal(prepared, processes)
            due = self.retention_rows if self.retention and step % self.retention_every == 0 else 0
            yield from self.micro_batches(prepared, [self.retention[row] for row in islice(general, due)])

    def _general(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.retention))

    def _drawn(self, rows: np.ndarray, draws_of_epoch: int) -> list[Any]:
        self.epoch, self.draws = self.draws // draws_of_epoch, self.draws + 1
        return [self.examples[row] for row in rows]

    def micro_batches(self, rows: list[E], retention: list[Example]) -> Iterator[Batch]:
        """This process's micro-batches of a step: the arranged rows, and the general text beside them."""
        totals = Counter(retention=sum(example.trained for example in retention))
        for row in rows:
            totals.update(self.counts(row))
        retention_size = ceil(len(retention) / (self.accumulation * self.world_size))
        for k in range(self.rank, self.accumulation * self.world_size, self.world_size):
            own = rows[k * self.micro_batch_size : (k + 1) * self.micro_batch_size]
            batch = self.collate(own)
            batch["counts"], batch["row_counts"] = dict(totals), [self.counts(row) for row in own]
            batch["epoch"], batch["row_sizes"] = self.epoch, [(row.trained, row.truncated) for row in own]
            general = retention[k * retention_size : (k + 1) * retention_size]
            # With several processes each takes part in every forward pass, if only with a masked token.
            if general or (retention and self.world_size > 1):
                batch["retention"] = self.collate_text(general)
            yield batch


def _forever(items_of_epoch: Callable[[int], Iterable[T]], size: int, start: int) -> Iterator[T]:
    """Items of all epochs, `size` in each, from number `start` on."""
    first = start // max(size, 1)
    return islice(chain.from_iterable(items_of_epoch(epoch) for epoch in count(first)), start - first * size, None)
