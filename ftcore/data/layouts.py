"""Examples to batches. The rows of a step depend on seed, epoch, position and lengths alone; the layout comes after.

A step is up to `global_batch_size` rows (the remainder of an epoch is spread over its steps, so none is much smaller).
They are sorted by length, cut into micro-batches and dealt to the processes in turn. Every batch carries `counts`: each
loss term's count over *all* micro-batches and processes of its step, so that sums divide exactly.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch

from ftcore.data.tokens import Example

Batch = dict[str, Any]


T = TypeVar("T")


def in_batches(items: Sequence[T], size: int) -> list[list[T]]:
    """Lists of `size` items, the last one shorter.

    >>> in_batches([1, 2, 3], 2)
    [[1, 2], [3]]
    """
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


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


def share_prompts(examples: Sequence[Example], pad_id: int, width: int) -> Batch:
    """Rows in which answers to one prompt follow it side by side: it is computed once, and no answer sees another.

    `segments` (rows, longest) is 0 in the prompt, k in its k-th answer and -1 in padding; `previous` is the place of the token
    before; `sequences` the number of the example; `ends` (2, examples) row and place of its last token; `order` the examples as
    they follow each other in the rows. `width`, the model's hidden size, decides how many answers a row holds.

    >>> one, two = Example("a", [5, 6, 7], [False, True, True]), Example("b", [5, 8], [False, True])
    >>> batch = share_prompts([one, two], pad_id=0, width=64)
    >>> batch["input_ids"].tolist(), batch["segments"].tolist(), batch["previous"].tolist()
    ([[5, 6, 7, 8]], [[0, 1, 1, 2]], [[0, 0, 1, 0]])
    """
    rows = _rows_sharing(examples, width)
    prompts = [_prompt_length(examples[row[0]]) for row in rows]
    longest = max(p + sum(len(examples[k]) - p for k in row) for p, row in zip(prompts, rows, strict=True))
    names = ("input_ids", "position_ids", "previous", "sequences")
    batch: Batch = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in names}
    batch["input_ids"].fill_(pad_id)
    batch["segments"] = torch.full((len(rows), longest), -1)
    batch["completion_mask"] = torch.zeros(len(rows), longest, dtype=torch.bool)
    batch["ends"] = torch.zeros(2, len(examples), dtype=torch.long)
    for r, (p, row) in enumerate(zip(prompts, rows, strict=True)):
        batch["input_ids"][r, :p] = torch.tensor(examples[row[0]].input_ids[:p])
        batch["position_ids"][r, :p], batch["segments"][r, :p] = torch.arange(p), 0
        start = p
        for segment, k in enumerate(row, 1):
            example, end = examples[k], start + len(examples[k]) - p
            place = (r, slice(start, end))
            batch["input_ids"][place] = torch.tensor(example.input_ids[p:], dtype=torch.long)
            batch["completion_mask"][place] = torch.tensor(example.completion_mask[p:], dtype=torch.bool)
            batch["position_ids"][place] = torch.arange(p, len(example))
            batch["previous"][place] = torch.arange(start - 1, end - 1)
            batch["previous"][r, start : min(start + 1, end)] = p - 1
            batch["segments"][place], batch["sequences"][place] = segment, k
            batch["ends"][:, k] = torch.tensor([r, end - 1 if end > start else p - 1])
            start = end
    mask = (batch["segments"] >= 0).long()
    return batch | {"attention_mask": mask, "order": list(chain(*rows)), "ids": [e.id for e in examples]}


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
