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

from ftcore.data.tokens import Example

Batch = dict[str, Any]
T = TypeVar("T")
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
        counts: an example's contribution to each loss term's count.
        retention: general text, `retention_rows` of it beside the rows of every `retention_every`-th step (none: no such term).
        steps: optimizer steps of the run.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        collate: Callable[[list[Example]], Batch],
        counts: Callable[[Example], dict[str, int]],
        retention: Sequence[Example] = (),
        *,
        retention_rows: int,
        retention_every: int,
        steps: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.examples, self.collate, self.counts, self.steps = examples, collate, counts, steps
        self.retention, self.retention_rows, self.retention_every = retention, retention_rows, retention_every
        self.global_batch_size, self.micro_batch_size, self.seed = global_batch_size, micro_batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.accumulation = global_batch_size // (micro_batch_size * world_size)

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[Batch]:
        lengths = [len(example.input_ids) for example in self.examples]
        general = _forever(lambda epoch: np.random.default_rng([self.seed, epoch, 1]).permutation(len(self.retention)))
        order = _forever(lambda epoch: steps_of_epoch(lengths, self.global_batch_size, self.seed, epoch))
        for step, rows in enumerate(islice(order, self.steps)):
            due = self.retention and step % self.retention_every == 0
            kept = [self.retention[row] for row in islice(general, self.retention_rows)] if due else []
            yield from self._micro_batches([self.examples[row] for row in rows], kept)

    def _micro_batches(self, rows: list[Example], retention: list[Example]) -> Iterator[Batch]:
        totals: Counter[str] = Counter(retention=sum(sum(example.completion_mask) for example in retention))
        for row in rows:
            totals.update(self.counts(row))
        rows = sorted(rows, key=lambda row: -len(row.input_ids))
        for k in range(self.accumulation):
            share = k * self.world_size + self.rank
            batch = self.collate(_share(rows, share, self.micro_batch_size)) | {"counts": dict(totals)}
            general = _share(retention, share, ceil(len(retention) / (self.accumulation * self.world_size)))
            # With several processes each takes part in every forward pass, if only with a masked token.
            if general or (retention and self.world_size > 1):
                batch["retention"] = self.collate(general)
            yield batch


def _share(rows: list[Example], number: int, size: int) -> list[Example]:
    return rows[number * size : (number + 1) * size]


def _forever(items_of_epoch: Callable[[int], Iterable[T]]) -> Iterator[T]:
    return chain.from_iterable(items_of_epoch(epoch) for epoch in count())


def pad(examples: list[Example], pad_id: int) -> Batch:
    """Right-padded tensors: input_ids, attention_mask and completion_mask, (rows, longest). No rows: one masked token.

    >>> batch = pad([Example("a", [5, 6, 7], [False, True, True]), Example("b", [5, 8], [False, True])], pad_id=0)
    >>> batch["input_ids"].tolist(), batch["completion_mask"].int().tolist()
    ([[5, 6, 7], [5, 8, 0]], [[0, 1, 1], [0, 1, 0]])
    """
    longest = max((len(example.input_ids) for example in examples), default=1)
    shape = (max(len(examples), 1), longest)
    input_ids = torch.full(shape, pad_id)
    attention_mask, completion_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    attention_mask[:, 0] = 1
    for k, example in enumerate(examples):
        n = len(example.input_ids)
        input_ids[k, :n] = torch.tensor(example.input_ids)
        attention_mask[k, :n] = 1
        completion_mask[k, :n] = torch.tensor(example.completion_mask)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "ids": [example.id for example in examples],
    }
