"""Completions with their rewards and numbers per token: what an online method trains on, shared out among the processes.

All processes know lengths and rewards of all samples of a step. The rest is in the process that sampled them and in that which
trains on them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ftcore.data.examples import Example
from ftcore.data.layouts import Batch, is_shared
from ftcore.machine.processes import dealt, rank_and_world


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(Example):
    """A prompt with a sampled completion, `truncated` if that was cut before it ended.

    `reward` is None where the completion is excluded, `parts` are the values it is made of, and `per_token` holds arrays (T,)
    with one number for each of the `trained` tokens of the completion. In a process that does not have it whole, a sample is
    an outline, without tokens and without numbers per token.
    """

    length: int
    trained: int
    reward: float | None
    parts: dict[str, float | None]
    per_token: dict[str, np.ndarray]

    def __len__(self) -> int:
        return self.length

    def outline(self) -> "Sample":
        """What all processes know of the sample."""
        return replace(self, input_ids=[], completion_mask=[], per_token={})


def whole(samples: Iterable[Sample]) -> list[Sample]:
    """Those of the samples that this process has whole."""
    return [one for one in samples if one.per_token]


def dealt_samples(rows: list[Sample], processes: list[int]) -> list[Sample]:
    """The rows, whole where this process trains on them; `processes` says which trains on each. All processes call this."""
    had, (rank, world) = {k: one for k, one in enumerate(rows) if one.per_token}, rank_and_world()
    away = [{k: one for k, one in had.items() if processes[k] == number != rank} for number in range(world)]
    for received in dealt(away):
        had |= received
    return [had.get(k, one) for k, one in enumerate(rows)]


def set_per_token(samples: list[Sample], name: str, values: Tensor) -> None:
    """Distribute a batch's values (N,), one per completion token, to its samples."""
    ends = np.cumsum([one.trained for one in samples], dtype=int)
    for one, numbers in zip(samples, np.split(values.float().cpu().numpy(), ends)[:-1], strict=True):
        one.per_token[name] = numbers


def in_batch_order(samples: list[Sample], batch: Batch) -> list[Sample]:
    """The samples in the order of their tokens in a batch."""
    return [samples[k] for k in batch["order"]] if is_shared(batch) else samples


def equal_rewards(group: list[Sample]) -> bool:
    """Whether all samples of a group have the same reward, so that none stands out."""
    return len({one.reward for one in group}) <= 1
