"""Examples to batches. The rows of a step depend on seed, epoch, position and lengths alone; the layout comes after.

A step is up to `global_batch_size` rows (the remainder of an epoch is spread over its steps, so none is much smaller).
They are sorted by length, cut into micro-batches and dealt to the processes in turn. Every batch carries `counts`: each
loss term's count over *all* micro-batches and processes of its step, so that sums divide exactly.

The letters of shapes, here and in every file:

    B  rows of a batch
    T  tokens of a row, padding included
    S  sequences of a batch: one in each row, or several where they are packed or share a prompt
    N  tokens with loss in a batch, row after row
    P  pairs of answers
    V  words of the vocabulary
    H  hidden size
"""

from collections.abc import Sequence
from itertools import chain
from typing import NotRequired, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypeIs

from ftcore.data.tokens import Example


class OfStep(TypedDict, total=False):
    """What data/steps.py adds to a training batch."""

    counts: dict[str, int]  # tokens, pairs, ... of all micro-batches and processes of the step, by name
    row_counts: list[dict[str, int]]  # the same of each row of this batch
    epoch: int
    facts: list[tuple[int, bool]]  # of each row: tokens with loss, whether it was cut
    retention: "Batch"  # general text, in some steps


class Batch(OfStep):
    """A sequence in each row, padded on the right; the other layouts add to it, and methods their own columns."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T): 1 for tokens, 0 for padding
    completion_mask: Tensor  # (B, T): True for tokens with loss
    targets: NotRequired[Tensor]  # (B, T): tokens to predict where they stand (masked words), not from those before
    ids: list[str]  # names of the rows of data; two sequences of a pair have one
    contents: NotRequired[list[int]]  # hash of each sequence, by which models/reference.py knows its log-probability


class Packed(Batch):
    """All sequences in one row, without padding."""

    position_ids: Tensor  # (B, T): from 0 on in each sequence


class SharedPrompts(Packed):
    """Answers to one prompt behind it in one row; none sees another."""

    segments: Tensor  # (B, T): 0 in the prompt, k in its k-th answer, -1 in padding
    previous: Tensor  # (B, T): place in the row of the token before, of an answer's first token the prompt's last
    sequences: Tensor  # (B, T): number of the sequence that an answer's token belongs to
    ends: Tensor  # (2, S): row and place of each sequence's last token
    order: list[int]  # sequences as they follow each other in the rows


T = TypeVar("T")


def is_packed(batch: Batch) -> TypeIs[Packed]:
    """Whether rows hold several sequences, also such as share a prompt."""
    return "position_ids" in batch


def is_shared(batch: Batch) -> TypeIs[SharedPrompts]:
    """Whether rows hold answers that share a prompt."""
    return "segments" in batch


def in_batches(items: Sequence[T], size: int) -> list[list[T]]:
    """Lists of `size` items, the last one shorter.

    >>> in_batches([1, 2, 3], 2)
    [[1, 2], [3]]
    """
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def pad(examples: Sequence[Example], pad_id: int) -> Batch:
    """Each sequence in a row, padded on the right. No examples: one masked token.

    >>> batch = pad([Example("a", [5, 6, 7], [False, True, True]), Example("b", [5, 8], [False, True])], pad_id=0)
    >>> batch["input_ids"].tolist(), batch["completion_mask"].int().tolist()
    ([[5, 6, 7], [5, 8, 0]], [[0, 1, 1], [0, 1, 0]])
    """
    shape = (max(len(examples), 1), max((len(example) for example in examples), default=1))  # (B, T)
    batch = Batch(
        input_ids=torch.full(shape, pad_id),
        attention_mask=torch.zeros(shape, dtype=torch.long),
        completion_mask=torch.zeros(shape, dtype=torch.bool),
        ids=[example.id for example in examples],
    )
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
    return batch


def pack(examples: list[Example]) -> Batch:
    """Sequences side by side in one row without padding; positions begin again at each, and none sees another.

    >>> batch = pack([Example("a", [5, 6, 7], [False, True, True]), Example("b", [5, 8], [True, True])])
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist(), batch["completion_mask"].int().tolist()
    ([[5, 6, 7, 5, 8]], [[0, 1, 2, 0, 1]], [[0, 1, 1, 0, 1]])
    """
    if not examples:
        return pad([], 0)
    ids, masks = zip(*((e.input_ids, [False, *e.completion_mask[1:]]) for e in examples), strict=True)
    return Packed(  # tensors (1, T)
        input_ids=torch.tensor([list(chain(*ids))]),
        position_ids=torch.tensor([[k for e in examples for k in range(len(e))]]),
        attention_mask=torch.ones(1, sum(map(len, examples)), dtype=torch.long),
        completion_mask=torch.tensor([list(chain(*masks))]),
        ids=[example.id for example in examples],
    )


def share_prompts(examples: Sequence[Example], pad_id: int, width: int) -> SharedPrompts:
    """Rows in which answers to one prompt follow it side by side: it is computed once, and no answer sees another.

    `width`, the model's hidden size, decides how many answers a row holds.

    >>> one, two = Example("a", [5, 6, 7], [False, True, True]), Example("b", [5, 8], [False, True])
    >>> batch = share_prompts([one, two], pad_id=0, width=64)
    >>> batch["input_ids"].tolist(), batch["segments"].tolist(), batch["previous"].tolist()
    ([[5, 6, 7, 8]], [[0, 1, 1, 2]], [[0, 0, 1, 0]])
    """
    rows = _rows_sharing(examples, width)
    prompts = [_prompt_length(examples[row[0]]) for row in rows]
    longest = max(p + sum(len(examples[k]) - p for k in row) for p, row in zip(prompts, rows, strict=True))
    batch = _without_tokens(examples, (len(rows), longest), pad_id)
    batch["order"] = list(chain(*rows))
    for r, (p, row) in enumerate(zip(prompts, rows, strict=True)):
        # The prompt once, at the beginning of the row.
        batch["input_ids"][r, :p] = torch.tensor(examples[row[0]].input_ids[:p])
        batch["position_ids"][r, :p], batch["segments"][r, :p] = torch.arange(p), 0
        start = p
        for segment, k in enumerate(row, 1):
            _put_answer(batch, r, start, examples[k], p)
            end = start + len(examples[k]) - p
            batch["segments"][r, start:end], batch["sequences"][r, start:end] = segment, k
            # An answer without tokens ends where its prompt does.
            batch["ends"][:, k] = torch.tensor([r, end - 1 if end > start else p - 1])
            start = end
    batch["attention_mask"] = (batch["segments"] >= 0).long()
    return batch


def _without_tokens(examples: Sequence[Example], shape: tuple[int, int], pad_id: int) -> SharedPrompts:
    """Rows (B, T) of padding, to be filled with `examples`."""
    return SharedPrompts(
        input_ids=torch.full(shape, pad_id),
        attention_mask=torch.zeros(shape, dtype=torch.long),
        completion_mask=torch.zeros(shape, dtype=torch.bool),
        position_ids=torch.zeros(shape, dtype=torch.long),
        segments=torch.full(shape, -1),
        previous=torch.zeros(shape, dtype=torch.long),
        sequences=torch.zeros(shape, dtype=torch.long),
        ends=torch.zeros(2, len(examples), dtype=torch.long),
        order=[],
        ids=[example.id for example in examples],
    )


def _put_answer(batch: SharedPrompts, r: int, start: int, example: Example, p: int) -> None:
    """Put the answer of `example`, what comes after its first `p` tokens, into row `r` from `start` on."""
    end = start + len(example) - p
    place = (r, slice(start, end))
    batch["input_ids"][place] = torch.tensor(example.input_ids[p:], dtype=torch.long)
    batch["completion_mask"][place] = torch.tensor(example.completion_mask[p:], dtype=torch.bool)
    # Positions go on from the prompt's, whatever answers stand between, and the first token is predicted by the prompt's last.
    batch["position_ids"][place] = torch.arange(p, len(example))
    batch["previous"][place] = torch.arange(start - 1, end - 1)
    batch["previous"][r, start : min(start + 1, end)] = p - 1


def _prompt_length(example: Example) -> int:
    """Tokens before the first with loss; at least one, as nothing comes before the first token."""
    return max(example.completion_mask.index(True), 1) if example.trained else len(example)


def _rows_sharing(examples: Sequence[Example], width: int) -> list[list[int]]:
    """Numbers of the examples of each row: those of one prompt, as many together as is cheapest.

    A row of T tokens costs 6 width T + T^2: matrix products against attention (Kaplan et al. 2020, arXiv:2001.08361, table 1).
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for k, example in enumerate(examples):
        groups.setdefault(tuple(example.input_ids[: _prompt_length(example)]), []).append(k)
    rows: list[list[int]] = []
    for prompt, members in groups.items():
        choices = [in_batches(members, size) for size in range(1, len(members) + 1)]
        costs = [sum(_cost(examples, row, len(prompt), width) for row in choice) for choice in choices]
        rows += choices[int(np.argmin(costs))]
    return rows


def _cost(examples: Sequence[Example], row: list[int], prompt: int, width: int) -> int:
    tokens = prompt + sum(len(examples[k]) - prompt for k in row)
    return (6 * width + tokens) * tokens
