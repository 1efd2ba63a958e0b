"""Examples to batches. The rows of a step depend on seed, epoch, position and lengths alone; the layout comes after.

A step is up to `global_batch_size` rows (the remainder of an epoch is spread over its steps, so none is much smaller).
They are sorted by length, cut into micro-batches and dealt to the processes in turn. Every batch carries `counts`: each
loss term's count over *all* micro-batches and processes of its step, so that sums divide exactly.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count, islice
from math import ceil
from typing import Any, TypeVar

import numpy as np
import torch

from ftcore.data.store import lengths
from ftcore.data.tokens import Example

Batch = dict[str, Any]
T = TypeVar("T")
# Draws the rows of the next step, and what a method makes of them: itself, or rollouts, or masked words.
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


class TrainBatches:
    """The micro-batches of a whole run for one process; accumulation is their number per step.

    Args:
        examples: rows to train on.
        collate: a list of examples to one batch of tensors; an empty list gives a batch without loss.
        counts: an example's contribution to the counts that loss terms are divided by.
        prepare: what to train on in a step, given a function that draws its rows and a random generator that is the same in
            every process (default: the rows).
        collate_text: `collate` of the general text (default: the same).
        retention: general text, `retention_rows` of it beside the rows of every `retention_every`-th step (none: no such term).
        steps: optimizer steps of the run.
        updates: optimizer steps on what one call of `prepare` returned.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        collate: Callable[[list[Any]], Batch],
        counts: Callable[[Any], dict[str, int]],
        retention: Sequence[Example] = (),
        prepare: Callable[[Draw, np.random.Generator], list[Any]] = lambda draw, _: draw(),
        collate_text: Callable[[list[Example]], Batch] | None = None,
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
        self.collate_text = collate_text or collate
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
        prepared: list[Any] = []
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

    def _micro_batches(self, rows: list[Any], retention: list[Example]) -> Iterator[Batch]:
        totals: Counter[str] = Counter(retention=sum(sum(example.completion_mask) for example in retention))
        for row in rows:
            totals.update(self.counts(row))
        rows = sorted(rows, key=lambda row: -len(row))
        for k in range(self.accumulation):
            share = k * self.world_size + self.rank
            mine = _share(rows, share, self.micro_batch_size)
            batch = self.collate(mine) | {"counts": dict(totals), "row_counts": [self.counts(row) for row in mine]}
            batch |= {"epoch": self.epoch, "facts": [(row.trained, row.truncated) for row in mine]}
            general = _share(retention, share, ceil(len(retention) / (self.accumulation * self.world_size)))
            # With several processes each takes part in every forward pass, if only with a masked token.
            if general or (retention and self.world_size > 1):
                batch["retention"] = self.collate_text(general)
            yield batch


def in_batches(items: Sequence[T], size: int) -> list[list[T]]:
    """Lists of `size` items, the last one shorter.

    >>> in_batches([1, 2, 3], 2)
    [[1, 2], [3]]
    """
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _share(rows: list[T], number: int, size: int) -> list[T]:
    return rows[number * size : (number + 1) * size]


def _forever(items_of_epoch: Callable[[int], Iterable[T]], size: int, start: int) -> Iterator[T]:
    """Items of all epochs, `size` in each, from number `start` on."""
    first = start // max(size, 1)
    return islice(chain.from_iterable(items_of_epoch(epoch) for epoch in count(first)), start - first * size, None)


def pad(examples: Sequence[Example], pad_id: int) -> Batch:
    """Right-padded tensors: input_ids, attention_mask and completion_mask, (rows, longest). No rows: one masked token.

    >>> batch = pad([Example("a", [5, 6, 7], [False, True, True]), Example("b", [5, 8], [False, True])], pad_id=0)
    >>> batch["input_ids"].tolist(), batch["completion_mask"].int().tolist()
    ([[5, 6, 7], [5, 8, 0]], [[0, 1, 1], [0, 1, 0]])
    """
    longest = max((len(example) for example in examples), default=1)
    shape = (max(len(examples), 1), longest)
    batch = {"input_ids": torch.full(shape, pad_id), "attention_mask": torch.zeros(shape, dtype=torch.long)}
    batch |= {"completion_mask": torch.zeros(shape, dtype=torch.bool)}
    batch["attention_mask"][:, 0] = 1
    if any(example.targets for example in examples):
        batch["targets"] = torch.zeros(shape, dtype=torch.long)
    for k, example in enumerate(examples):
        n = len(example)
        batch["input_ids"][k, :n] = torch.tensor(example.input_ids)
        batch["attention_mask"][k, :n] = 1
        batch["completion_mask"][k, :n] = torch.tensor(example.completion_mask)
        if example.targets:
            batch["targets"][k, :n] = torch.tensor(example.targets)
    return batch | {"ids": [example.id for example in examples]}


def pack(examples: list[Example]) -> Batch:
    """Sequences side by side in one row without padding; positions begin again at each, and none sees another.

    >>> batch = pack([Example("a", [5, 6, 7], [False, True, True]), Example("b", [5, 8], [True, True])])
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist(), batch["completion_mask"].int().tolist()
    ([[5, 6, 7, 5, 8]], [[0, 1, 2, 0, 1]], [[0, 1, 1, 0, 1]])
    """
    if not examples:
        return pad([], 0)
    ids, masks = zip(*((e.input_ids, [False, *e.completion_mask[1:]]) for e in examples), strict=True)
    return {
        "input_ids": torch.tensor([list(chain(*ids))]),
        "position_ids": torch.tensor([[k for e in examples for k in range(len(e))]]),
        "attention_mask": torch.ones(1, sum(map(len, examples)), dtype=torch.long),
        "completion_mask": torch.tensor([list(chain(*masks))]),
        "ids": [example.id for example in examples],
    }
