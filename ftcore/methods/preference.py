"""What methods on preference pairs share: both answers in one batch, their summed log-probabilities, and the metrics.

A subclass says what a pair costs, and whether rewards are relative to the base model or per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ftcore.data.examples import Pair
from ftcore.data.layouts import Batch
from ftcore.data.sources import Row
from ftcore.methods.base import Method, Positive
from ftcore.methods.terms import Term, metrics
from ftcore.models.logprobs import completion_logps, row_sums


class Answers(NamedTuple):
    """One side of P pairs: the chosen or the rejected answers."""

    logps: Tensor  # (P,), summed over the answer's tokens
    ref_logps: Tensor  # (P,), the same under the base model; zeros unless the method has a reference
    lengths: Tensor  # (P,), numbers of tokens


class PairBatch(Batch):
    """The chosen answers of P pairs, then the rejected ones: S = 2P. `ids` are those of the pairs."""

    margins: Tensor  # (P,): by how much the chosen answer is better, at least (reward models)
    chosen_tokens: int  # tokens with loss of all chosen answers


class PairMethod(Method[Pair, PairBatch]):
    """Base class of methods on pairs of answers to one prompt."""

    record_type = "preference"

    def encode(self, rows: list[Row]) -> list[Pair]:
        """Each prompt with its chosen and with its rejected answer."""
        return self.encoder.pairs(rows)

    def counts(self, pair: Pair) -> dict[str, int]:
        """One pair, and the tokens of its chosen answer."""
        return {"pairs": 1, "tokens": sum(pair.chosen.completion_mask[1:])}

    def collate(self, pairs: list[Pair]) -> PairBatch:
        """The chosen answers, then the rejected ones."""
        both = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        margins = torch.tensor([pair.margin for pair in pairs])
        batch = self.collate_text(both, shared_prompts=True)
        tokens = sum(self.counts(pair)["tokens"] for pair in pairs)
        return {**batch, "ids": [pair.id for pair in pairs], "margins": margins, "chosen_tokens": tokens}


class PreferenceMethod(PairMethod):
    """Base class of methods that make the chosen answer likelier than the rejected one."""

    beta: Positive
    # Weight of the chosen answers' negative log-likelihood per token, added to the loss of the pairs.
    nll_weight = 0.0
    # Whether rewards are means over the answer's tokens instead of sums.
    per_token = False

    def pair_loss(self, chosen: Answers, rejected: Answers) -> Tensor:
        """Loss (P,) of each pair."""
        raise NotImplementedError

    def reward(self, answers: Answers) -> Tensor:
        """Implicit reward (P,): beta times the log-probability, relative to the base model if the method has a reference."""
        rewards = self.beta * (answers.logps - answers.ref_logps if self.has_reference else answers.logps)
        return rewards / answers.lengths.clamp(min=1) if self.per_token else rewards

    def loss(self, batch: PairBatch) -> dict[str, Term]:
        """The pairs' loss, the chosen answers' likelihood if it has weight, and the metrics of the DPO authors."""
        n, logps = len(batch["ids"]), completion_logps(self.network, batch)  # P pairs; (N,)
        sums, lengths = row_sums(logps, batch), row_sums(torch.ones_like(logps), batch)  # (S,), the chosen ones first
        ref_sums = self.reference_sums(batch) if self.has_reference else torch.zeros_like(sums)
        chosen, rejected = (Answers(sums[k], ref_sums[k], lengths[k]) for k in (slice(n), slice(n, 2 * n)))
        terms = {"pairs": Term(self.pair_loss(chosen, rejected), n, "pairs")}
        if self.nll_weight:
            terms["nll"] = Term(-chosen.logps, batch["chosen_tokens"], "tokens", self.nll_weight)
        logps_of = metrics("pairs", {"logps/chosen": chosen.logps, "logps/rejected": rejected.logps})
        return terms | reward_metrics(self.reward(chosen), self.reward(rejected)) | logps_of


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Term]:
    """Rewards (P,) of both answers, their margin, and how often the chosen one has the higher reward."""
    values = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected, "accuracies": chosen > rejected}
    return metrics("pairs", {f"rewards/{name}": value.float() for name, value in values.items()})
