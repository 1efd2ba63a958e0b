"""What methods on preference pairs share: both answers in one batch, the summed log-probabilities of each, and metrics.

A subclass says what an answer's implicit reward is and what a pair costs.
"""

from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Gt
from torch import Tensor

from ftcore.data.layouts import Batch
from ftcore.data.sources import Row
from ftcore.data.tokens import Pair
from ftcore.methods.base import Method, Term
from ftcore.models.logprobs import completion_logps, row_sums

Beta = Annotated[float, Gt(0)]


class Answers(NamedTuple):
    """One side of P pairs."""

    logps: Tensor  # (P,), summed over the answer's tokens
    ref_logps: Tensor  # (P,), the same under the base model, or zeros
    lengths: Tensor  # (P,), numbers of tokens


class PairBatch(Batch):
    """The chosen answers of P pairs, then the rejected ones: S = 2P; `ids` are those of the pairs."""

    margins: Tensor  # (P,): by how much the chosen answer is better, at least (reward models)


class PairMethod(Method[Pair, PairBatch]):
    """Base class of methods on pairs of answers to one prompt."""

    record_type = "preference"

    def encode(self, rows: list[Row]) -> list[Pair]:
        """Prompt with the chosen and prompt with the rejected answer."""
        return self.encoder.pairs(rows)

    def counts(self, pair: Pair) -> dict[str, int]:
        """One pair, and the tokens of its chosen answer."""
        return {"pairs": 1, "tokens": sum(pair.chosen.completion_mask[1:])}

    def collate(self, pairs: list[Pair]) -> PairBatch:
        """The chosen answers, then the rejected ones."""
        both = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        margins = torch.tensor([pair.margin for pair in pairs])
        return {**self.collate_answers(both), "ids": [pair.id for pair in pairs], "margins": margins}


class PreferenceMethod(PairMethod):
    """Base class of methods that make the chosen answer likelier than the rejected one."""

    # Weight of the chosen answers' negative log-likelihood per token, beside the pairs' loss.
    nll_weight = 0.0

    def __init__(self, *given: Any, beta: Beta, **shared: Any) -> None:
        super().__init__(*given, **shared)
        self.beta = beta

    def reward(self, answers: Answers) -> Tensor:
        """Implicit reward (P,) of answers."""
        raise NotImplementedError

    def pair_loss(self, chosen: Answers, rejected: Answers) -> Tensor:
        """Loss (P,) of each pair."""
        raise NotImplementedError

    def loss(self, batch: PairBatch) -> dict[str, Term]:
        """The pairs' loss, the chosen answers' likelihood where it has weight, and the metrics of the DPO authors."""
        n, logps = len(batch["ids"]), completion_logps(self.network, batch)  # P pairs; (N,)
        sums, lengths = row_sums(logps, batch), row_sums(torch.ones_like(logps), batch)  # (S,), the chosen ones first
        ref_sums = self.reference_sums(batch) if self.has_reference else torch.zeros_like(sums)
        chosen, rejected = (Answers(sums[k], ref_sums[k], lengths[k]) for k in (slice(n), slice(n, 2 * n)))
        terms = {"pairs": Term(self.pair_loss(chosen, rejected), n, "pairs")}
        if self.nll_weight:
            terms["nll"] = Term(-chosen.logps, int(chosen.lengths.sum()), "tokens", self.nll_weight)
        return terms | self._metrics(chosen, rejected, n)

    @torch.no_grad()
    def _metrics(self, chosen: Answers, rejected: Answers, n: int) -> dict[str, Term]:
        better, worse = self.reward(chosen), self.reward(rejected)
        values = {
            "rewards/chosen": better,
            "rewards/rejected": worse,
            "rewards/margins": better - worse,
            "rewards/accuracies": (better > worse).float(),
            "logps/chosen": chosen.logps,
            "logps/rejected": rejected.logps,
        }
        return {name: Term(value, n, "pairs", 0.0) for name, value in values.items()}
