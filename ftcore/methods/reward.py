"""Reward model: a score per answer that is higher for the better one (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1).

loss = -log sigmoid(s(chosen) - s(rejected) - margin) + centering (s(chosen) + s(rejected))^2, averaged over the pairs of the
step. The centring term keeps scores around zero (Eisenstein et al. 2023, arXiv:2312.09244). The model is transformers'
sequence classifier with one label.
"""

from collections.abc import Mapping

from ftcore.methods.base import NonNegative
from ftcore.methods.losses import bradley_terry
from ftcore.methods.preference import PairBatch, PairMethod, reward_metrics
from ftcore.methods.terms import Term
from ftcore.models.logprobs import sequence_scores


class Reward(PairMethod):
    """Learns to score answers from pairs of them."""

    centering: NonNegative

    @classmethod
    def architecture_of(cls, node: Mapping[str, object]) -> str:
        """A model with a score instead of a vocabulary."""
        return "SequenceClassification"

    def loss(self, batch: PairBatch) -> dict[str, Term]:
        """Loss of the score differences; scores and accuracy as metrics."""
        n, scores = len(batch["ids"]), sequence_scores(self.network, batch)  # P pairs; (S,)
        chosen, rejected = scores[:n], scores[n : 2 * n]  # (P,) each
        losses = bradley_terry(chosen, rejected, batch["margins"]) + self.centering * (chosen + rejected) ** 2
        return {"pairs": Term(losses, n, "pairs"), **reward_metrics(chosen, rejected)}
