"""Layouts of a batch: one sequence in each row, all sequences packed into one row, or answers behind a shared prompt.

Every training batch carries `counts`: each loss term's count over *all* micro-batches and processes of its step, so that sums
divide exactly.

The letters of shapes, here and in every file:

    B  rows of a batch
    T  tokens of a row, padding included
    S  sequences of a batch: one in each row, or several where they are packed or share a prompt
    N  tokens with loss in a batch, row after row; without the first of a sequence, which nothing predicts
    P  pairs of answers
    V  words of the vocabulary
    H  hidden size
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NotRequired, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import TypeIs

from ftcore.data.examples import Example


class Batch(TypedDict):
    """One sequence in each row, padded on the right. The other layouts add to it, and methods their own columns."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T): 1 for tokens, 0 for padding
    trained: Tensor  # (2, N): row and column of each token with loss; found here, as a GPU would have to be waited for
    ends: NotRequired[Tensor]  # (2, S): row and column of each sequence's last token; not of packed ones
    targets: NotRequired[Tensor]  # (B, T): tokens to predict at their own place (masked words), not from those before
    tokens: int  # all but padding
    ids: list[str]  # ids of the rows of data; both sequences of a pair have the same
    contents: NotRequired[list[int]]  # hash of each sequence, by which models/reference.py caches its log-probability
    # What data/steps.py adds in training:
    counts: NotRequired[dict[str, int]]  # tokens, pairs, ... of all micro-batches and processes of the step, by name
    row_counts: NotRequired[list[dict[str, int]]]  # the same of each row of this batch
    row_sizes: NotRequired[list[tuple[int, bool]]]  # of each row: tokens with loss, whether it was truncated
    epoch: NotRequired[int]
    retention: NotRequired["Batch"]  # general text, in some steps


class Packed(Batch):
    """All sequences in one row, without padding."""

    position_ids: Tensor  # (B, T): counted from 0 in each sequence
    lengths: list[int]  # tokens of each sequence
    sequences: Tensor  # (B, T): number of the sequence that a token belongs to


class SharedPrompts(Batch):
    """In each row a prompt and its answers, which do not see each other."""

    position_ids: Tensor  # (B, T): those of an answer go on from the prompt's
    sequences: Tensor  # (B, T): number of the sequence that an answer's token belongs to
    segments: Tensor  # (B, T): 0 in the prompt, k in its k-th answer, -1 in padding
    previous: Tensor  # (B, T): place of the token that predicts this one; for an answer's first, the prompt's last
    order: list[int]  # numbers of the sequences in the order in which they stand in the rows


T = TypeVar("T")


def is_packed(batch: Batch) -> TypeIs[Packed]:
    """Whether rows hold several sequences one after the other."""
    return "lengths" in batch


def is_shared(batch: Batch) -> TypeIs[SharedPrompts]:
    """Whether the answers of a row share a prompt."""
    return "segments" in batch


def in_batches(items: Sequence[T], size: int) -> list[list[T]]:
    """Lists of `size` items, the last one shorter.

    >>> in_batches([1, 2, 3], 2)
    [[1, 2], [3]]
    """
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def pad(examples: Sequence[Example], pad_id: int) -> Batch:
    """One sequence in each row, padded on the right. Without examples: a single masked token.

    >>> batch = pad([Example("a", [5, 6, 7], [False, True, True]), Example("b", [5, 8], [False, True])], pad_id=0)
    >>> batch["input_ids"].tolist(), batch["trained"].tolist(), batch["ends"].tolist()
    ([[5, 6, 7], [5, 8, 0]], [[0, 0, 1], [1, 2, 1]], [[0, 1], [2, 1]])
    """
    ids = [example.input_ids or [pad_id] for example in examples] or [[pad_id]]
    in_place = any(example.targets for example in examples)
    first = slice(0 if in_place else 1, None)  # nothing predicts a first token
    batch = Batch(
        input_ids=_padded(ids, pad_id),
        attention_mask=_padded([[1] * len(row) for row in ids], 0),
        trained=_trained([[False] * first.start + example.completion_mask[first] for example in examples]),
        ends=torch.tensor([[k, len(row) - 1] for k, row in enumerate(ids)]).T,
        tokens=sum(map(len, examples)),
        ids=[example.id for example in examples],
    )
    if in_place:
        batch["targets"] = _padded([example.targets or [0] * len(example) for example in examples], 0)
    return batch


def _trained(masks: Sequence[Sequence[bool]]) -> Tensor:
    """Row and column (2, N) of each token with loss, row after row.

    >>> _trained([[False, True], [True]]).tolist()
    [[0, 1], [1, 0]]
    """
    columns = [np.flatnonzero(mask) for mask in masks]
    rows = np.repeat(np.arange(len(masks)), list(map(len, columns)))
    return torch.from_numpy(np.stack([rows, np.concatenate([*columns, rows[:0]])]))


def _padded(rows: Iterable[Sequence[int]], fill: int) -> Tensor:
    """Rows of different lengths as one tensor (B, T), filled up with `fill`."""
    return pad_sequence([torch.from_numpy(np.array(row)) for row in rows], batch_first=True, padding_value=fill)


def pack(examples: list[Example]) -> Batch:
    """All sequences in one row without padding. Positions begin again at each sequence, and none sees another.

    >>> batch = pack([Example("a", [5, 6, 7], [False, True, True]), Example("b", [5, 8], [True, True])])
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist(), batch["sequences"].tolist(), batch["trained"].tolist()
    ([[5, 6, 7, 5, 8]], [[0, 1, 2, 0, 1]], [[0, 0, 0, 1, 1]], [[0, 0, 0], [1, 2, 4]])
    """
    if not examples:
        return pad([], 0)
    lengths = list(map(len, examples))
    return Packed(
        input_ids=_padded([[token for e in examples for token in e.input_ids]], 0),
        position_ids=_padded([[k for n in lengths for k in range(n)]], 0),
        attention_mask=torch.ones(1, sum(lengths), dtype=torch.long),
        trained=_trained([[trained for e in examples for trained in (False, *e.completion_mask[1:])]]),
        lengths=lengths,
        sequences=torch.repeat_interleave(torch.tensor(lengths))[None],
        tokens=sum(lengths),
        ids=[example.id for example in examples],
    )


def share_prompts(examples: Sequence[Example], pad_id: int, width: int) -> SharedPrompts:
    """Rows of a prompt and its answers: the prompt is computed once, and no answer sees another.

    `width`, the model's hidden size, decides how many answers a row holds.

    >>> one, two = Example("a", [5, 6, 7], [False, True, True]), Example("b", [5, 8], [False, True])
    >>> batch = share_prompts([one, two], pad_id=0, width=64)
    >>> batch["input_ids"].tolist(), batch["segments"].tolist(), batch["previous"].tolist()
    ([[5, 6, 7, 8]], [[0, 1, 1, 2]], [[0, 0, 1, 0]])
    """
    rows = _grouped_by_prompt(examples, width)
    *columns, last = zip(*(_shared_row(examples, row) for row in rows), strict=True)
    ids, mask, positions, segments, previous, sequences = map(_padded, columns, (pad_id, 0, 0, -1, 0, 0))
    ends = {k: (r, place) for r, row in enumerate(rows) for k, place in zip(row, last[r], strict=True)}
    return SharedPrompts(
        input_ids=ids,
        attention_mask=(segments >= 0).long(),
        trained=mask.nonzero().T,
        position_ids=positions,
        segments=segments,
        previous=previous,
        sequences=sequences,
        ends=torch.tensor([ends[k] for k in range(len(examples))]).T,
        order=list(chain(*rows)),
        tokens=int((segments >= 0).sum()),
        ids=[example.id for example in examples],
    )


def _shared_row(examples: Sequence[Example], numbers: list[int]) -> tuple[Sequence[int], ...]:
    """Of the row of these examples: tokens, loss mask, positions, segments, previous, sequences, and where each one ends."""
    p = _prompt_length(examples[numbers[0]])
    ids, mask, positions = examples[numbers[0]].input_ids[:p], [False] * p, [*range(p)]
    segments, previous, sequences, ends = [0] * p, [0] * p, [0] * p, list[int]()
    for segment, k in enumerate(numbers, 1):
        start, n = len(ids), len(examples[k]) - p
        ids += examples[k].input_ids[p:]
        mask += examples[k].completion_mask[p:]
        positions += range(p, p + n)  # they go on from the prompt's, whatever answers stand between
        segments += [segment] * n
        previous += [p - 1, *range(start, start + n - 1)][:n]
        sequences += [k] * n
        ends.append(len(ids) - 1 if n else p - 1)  # an answer without tokens ends where its prompt does
    return ids, mask, positions, segments, previous, sequences, ends


def _prompt_length(example: Example) -> int:
    """Tokens before the first with loss; at least one, as nothing predicts the first token."""
    return max(example.completion_mask.index(True), 1) if example.trained else len(example)


def _grouped_by_prompt(examples: Sequence[Example], width: int) -> list[list[int]]:
    """Numbers of the examples of each row: examples of one prompt, as many together as is cheapest.

    A row of T tokens costs 6 width T + T^2: matmuls and attention (Kaplan et al. 2020, arXiv:2001.08361, table 1).
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for k, example in enumerate(examples):
        groups.setdefault(tuple(example.input_ids[: _prompt_length(example)]), []).append(k)
    rows: list[list[int]] = []
    for prompt, numbers in groups.items():
        choices = [in_batches(numbers, size) for size in range(1, len(numbers) + 1)]
        rows += min(choices, key=lambda choice: sum(_cost(examples, row, len(prompt), width) for row in choice))
    return rows


def _cost(examples: Sequence[Example], numbers: list[int], prompt: int, width: int) -> int:
    tokens = prompt + sum(len(examples[k]) - prompt for k in numbers)
    return (6 * width + tokens) * tokens
