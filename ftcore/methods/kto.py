"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8): single answers labelled good or bad.

loss = w (1 - sigmoid(s beta (log p(y) - log p_ref(y) - z))), s = 1 for good answers and -1 for bad ones. z estimates
KL(policy || reference) from prompts with another prompt's answer: the mean of their log-ratios, at least 0, without gradient,
over the whole optimizer step (over the batch where rows are only scored).
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import Tensor

from ftcore.data.batches import Batch, Draw, in_batches
from ftcore.data.sources import Row
from ftcore.data.tokens import Example
from ftcore.methods.base import Method, Term
from ftcore.methods.preference import reference_sums, sequence_sums
from ftcore.processes import shared_out


@dataclass(frozen=True, slots=True)
class Labelled:
    """An answer, whether it is good, its prompt with another prompt's answer, and z once it is known."""

    id: str
    answer: Example
    good: bool
    other: Example
    z: float | None = None

    def __len__(self) -> int:
        return len(self.answer)


class KTO(Method):
    """Raises good answers and lowers bad ones relative to the base model; no pairs needed."""

    record_type = "unpaired"
    has_reference = True

    def __init__(
        self,
        *given: Any,
        beta: Annotated[float, Gt(0)],
        desirable_weight: Annotated[float, Ge(0)],
        undesirable_weight: Annotated[float, Ge(0)],
        **shared: Any,
    ) -> None:
        super().__init__(*given, **shared)
        self.beta, self.desirable_weight, self.undesirable_weight = beta, desirable_weight, undesirable_weight

    def encode(self, rows: list[Row]) -> list[Labelled]:
        """Each row's answer, and the answer of the next row that has another prompt."""
        others = [
            next((r for r in rows[k + 1 :] + rows[:k] if r["prompt"] != row["prompt"]), row)
            for k, row in enumerate(rows)
        ]
        found = []
        for row, other in zip(rows, others, strict=True):
            answers = self.encoder.prompt_completions([row, {**row, "completion": other["completion"]}])
            if len(answers) == 2:
                found.append(Labelled(row["id"], answers[0], row["label"], answers[1]))
        return found

    def counts(self, example: Labelled) -> dict[str, int]:
        """One row, good or bad."""
        return {"rows": 1, "good": int(example.good), "bad": int(not example.good)}

    def collate(self, examples: list[Labelled]) -> Batch:
        """Answers, with z where the step's is known and the other answers where it is not."""
        batch = self.collate_text([example.answer for example in examples])
        batch["good"] = torch.tensor([example.good for example in examples], dtype=torch.bool)
        if examples and examples[0].z is None:
            return batch | {"others": self.collate_text([example.other for example in examples])}
        return batch | {"z": examples[0].z if examples else 0.0}

    def prepare(self, draw: Draw, random: np.random.Generator) -> list[Labelled]:
        """The step's rows with its z."""
        rows = draw()
        ratios = shared_out([row.other for row in rows], self._log_ratios)
        z = max(sum(ratios) / len(ratios), 0.0)
        return [replace(row, z=z) for row in rows]

    def _log_ratios(self, examples: list[Example]) -> list[float]:
        batches = (self.placed(self.collate_text(part)) for part in in_batches(examples, self.micro_batch_size))
        return [ratio for batch in batches for ratio in self._without_gradient(batch).tolist()]

    @torch.no_grad()
    def _without_gradient(self, batch: Batch) -> Tensor:
        return sequence_sums(self.network, batch) - reference_sums(self.foundation, batch)

    def loss(self, batch: Batch) -> dict[str, Term]:
        """Each row's loss, and the implicit rewards of good and bad rows."""
        n, good = len(batch["ids"]), batch["good"]
        z = batch["z"] if "z" in batch else self._without_gradient(batch["others"]).mean().clamp(min=0)
        ratios = (sequence_sums(self.network, batch) - reference_sums(self.foundation, batch))[:n]
        sign, weight = torch.where(good, 1.0, -1.0), torch.where(good, self.desirable_weight, self.undesirable_weight)
        losses = weight * (1 - torch.sigmoid(sign * self.beta * (ratios - z)))
        rewards = self.beta * ratios.detach()
        return {
            "rows": Term(losses.sum(), n, "rows"),
            "kl": Term(torch.as_tensor(z) * torch.tensor(float(n)), n, "rows", 0.0),
            "rewards/chosen": Term(rewards[good].sum(), int(good.sum()), "good", 0.0),
            "rewards/rejected": Term(rewards[~good].sum(), int((~good).sum()), "bad", 0.0),
        }
