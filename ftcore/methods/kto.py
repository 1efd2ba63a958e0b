"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8): single answers labelled good or bad.

loss = w (1 - sigmoid(s beta (log p(y) - log p_ref(y) - z))), s = 1 for good answers and -1 for bad ones. z estimates
KL(policy || reference) from prompts with another prompt's answer: the mean of their log-ratios, at least 0, without gradient,
over the whole optimizer step (over the batch if rows are only scored).
"""

from dataclasses import replace
from typing import NotRequired, cast

import numpy as np
import torch
from torch import Tensor

from ftcore.data.examples import Example, Labelled
from ftcore.data.layouts import Batch, in_batches
from ftcore.data.sources import Row
from ftcore.data.steps import Draw
from ftcore.data.transforms import mismatched
from ftcore.machine.processes import shared_out
from ftcore.methods.base import Method, NonNegative, Positive
from ftcore.methods.terms import Term
from ftcore.models.logprobs import sequence_sums


class LabelledBatch(Batch):
    """Answers with their labels, and z or the batch that it is estimated from."""

    good: Tensor  # True for good answers, one value for each of `ids`
    good_rows: int  # how many they are
    z: float | None
    others: NotRequired[Batch]  # if z is None: the prompts with other rows' answers


class KTO(Method[Labelled, LabelledBatch]):
    """Raises good answers and lowers bad ones relative to the base model; no pairs needed."""

    record_type = "unpaired"
    has_reference = True
    apart_between_steps = True  # for z
    beta: Positive
    desirable_weight: NonNegative
    undesirable_weight: NonNegative

    def encode(self, rows: list[Row]) -> list[Labelled]:
        """Each prompt with its answer and label."""
        return self.encoder.labelled(rows)

    def counts(self, example: Labelled) -> dict[str, int]:
        """One row, good or bad."""
        return {"rows": 1, "good": int(example.good), "bad": int(not example.good)}

    def collate(self, examples: list[Labelled]) -> LabelledBatch:
        """Answers with the step's z, or with the answers of other rows if z is not known."""
        good, z = torch.tensor([e.good for e in examples], dtype=torch.bool), examples[0].z if examples else 0.0
        batch = cast(LabelledBatch, {**self.collate_text(examples), "good": good, "good_rows": int(good.sum()), "z": z})
        if batch["z"] is None:
            batch["others"] = self.collate_text(mismatched(examples, self.encoder.max_length))
        return batch

    def prepare(self, draw: Draw, random: np.random.Generator) -> list[Labelled]:
        """The step's rows with its z."""
        return self.held_out_rows(draw())

    def held_out_rows(self, examples: list[Labelled]) -> list[Labelled]:
        """The rows with their z, so that nothing depends on which of them share a batch."""
        others = in_batches(mismatched(examples, self.encoder.max_length), self.context.micro_batch_size)
        z = max(float(torch.cat(shared_out(others, self._ratios_of)).mean()), 0.0) if examples else 0.0
        return [replace(one, z=z) for one in examples]

    def _ratios_of(self, mine: list[list[Example]]) -> list[Tensor]:
        """`_z_ratios` of each of this process's batches, on the host, which waits for all of them at once."""
        ratios = [self._z_ratios(self.to_device(self.collate_text(rows))) for rows in mine]
        return list(torch.cat(ratios).cpu().split(list(map(len, mine)))) if mine else []

    @torch.no_grad()
    def _z_ratios(self, batch: Batch) -> Tensor:
        """Log-ratio (S,) of each answer to the base model, without gradient: z is their mean."""
        return sequence_sums(self.network, batch) - self.reference_sums(batch)

    def loss(self, batch: LabelledBatch) -> dict[str, Term]:
        """Each row's loss, and the implicit rewards of good and bad rows."""
        n, good, z = len(batch["ids"]), batch["good"], batch["z"]
        z = float(self._z_ratios(batch["others"]).mean().clamp(min=0)) if z is None else z
        # Without rows the batch has a masked one, which [:n] drops.
        ratios = (sequence_sums(self.network, batch) - self.reference_sums(batch))[:n]
        sign, weight = torch.where(good, 1.0, -1.0), torch.where(good, self.desirable_weight, self.undesirable_weight)
        rewards = self.beta * ratios.detach()
        return {
            "rows": Term(weight * (1 - torch.sigmoid(sign * self.beta * (ratios - z))), n, "rows"),
            "kl": Term(torch.tensor(z * n), n, "rows", 0.0),
            "rewards/chosen": Term(torch.where(good, rewards, 0.0), batch["good_rows"], "good", 0.0),
            "rewards/rejected": Term(torch.where(good, 0.0, rewards), n - batch["good_rows"], "bad", 0.0),
        }
