"""Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) and its relatives.

loss = mean of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta KL(policy || base). A is the completion's advantage over
the others of its prompt, r the ratio of its probability now to that when it was sampled.

advantage: group (R - mean) / std over the group (GRPO); group_no_std without the division (Dr. GRPO, Liu et al. 2025,
arXiv:2503.20783); rloo R minus the mean of the others (Ahmadian et al. 2024, arXiv:2402.14740); reinforce R itself.
ratio: token by token (GRPO); sequence_mean, the geometric mean over the completion (GSPO, Zheng et al. 2025, arXiv:2507.18071);
sequence, their product (RLOO).
aggregate: tokens, mean over all tokens of the step (DAPO, Yu et al. 2025, arXiv:2503.14476); sequences, mean of each completion's
mean (GRPO); budget, sum over max_new_tokens per completion (Dr. GRPO).
"""

from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from ftcore.data.layouts import Batch
from ftcore.data.sources import Row
from ftcore.data.steps import Draw
from ftcore.methods.base import Clip, Fraction, Positive, PositiveFraction
from ftcore.methods.losses import clipped_policy_loss, kl_estimate
from ftcore.methods.online import OnlineMethod, Rollouts
from ftcore.methods.terms import Term, metrics
from ftcore.models.logprobs import row_numbers, row_sums, token_outputs
from ftcore.rewards.functions import Scored
from ftcore.rewards.worker import Rewards
from ftcore.rollout.samples import Sample, equal_rewards
from ftcore.settings import PathOfWeights

Advantage = Literal["group", "group_no_std", "rloo", "reinforce"]


class GRPO(OnlineMethod):
    """Reinforces completions that score above the others of their prompt."""

    per_token_names = ("old_logps", "ref_logps", "advantages")

    advantage: Advantage
    ratio: Literal["token", "sequence_mean", "sequence"]
    aggregate: Literal["tokens", "sequences", "budget"]
    clip_low: PositiveFraction
    clip_high: Clip
    max_resamples: Annotated[int, Ge(0)]
    rewards: list[str]
    reward_weights: list[float]
    reward_options: dict[str, dict[str, object]]
    reward_model: PathOfWeights
    reward_model_weight: float
    reward_time_limit: Positive
    max_failed_share: Fraction

    def __post_init__(self) -> None:
        super().__post_init__()
        path, precision = self.reward_model, self.context.precision
        self.scorer = self.context.reward_model(path, self.encoder, precision) if path else None
        limits = {"time_limit": self.reward_time_limit, "max_failed_share": self.max_failed_share}
        trust = [name.split(".")[0] for name in self.rewards if "." in name]  # config/check.py has refused all others
        self.functions = Rewards(self.rewards, self.reward_weights, self.reward_options, trust=trust, **limits)

    def compute_rewards(self, rows: list[Row], texts: list[str], ids: list[list[int]]) -> Scored:
        """Weighted sum of the reward functions, plus the reward model's score if there is one."""
        totals, parts = self.functions.score([row["prompt"] for row in rows], texts, ids, rows)
        if self.scorer:
            scores = self.model_scores(rows, texts)
            pairs = zip(totals, scores, strict=True)
            totals = [None if total is None else total + self.reward_model_weight * score for total, score in pairs]
            parts["reward_model"] = list(scores)
        return totals, parts

    def prepare(self, draw: Draw, random: np.random.Generator) -> list[Sample]:
        """Sample groups; those with equal rewards teach nothing and are replaced, in at most `max_resamples` further draws."""
        prompts = draw()
        groups = self.sample_groups(prompts, random)
        self.metrics = self.rollout_metrics(groups)
        usable = self.usable(groups)
        for _ in range(self.max_resamples if self.advantage != "reinforce" else 0):
            if len(usable) - sum(map(equal_rewards, usable)) >= len(prompts):
                break
            usable += self.usable(self.sample_groups(draw(), random))
        return self.watched(groups, self.compute_advantages(sorted(usable, key=equal_rewards)[: len(prompts)]))

    def compute_advantages(self, groups: list[list[Sample]]) -> list[Sample]:
        """Every token of a completion gets the completion's advantage."""
        for group in groups:
            rewards = [one.reward for one in group if one.reward is not None]  # all: the others are not usable
            for one, value in zip(group, advantages(rewards, self.advantage), strict=True):
                if one.per_token:
                    one.per_token["advantages"] = np.full(one.trained, value, np.float32)
        return [one for group in groups for one in group]

    def loss(self, batch: Rollouts) -> dict[str, Term]:
        """Clipped policy loss with the KL term; entropy, clipping and KL as metrics."""
        logps, entropies, _ = token_outputs(self.network, batch, self.temperature, entropies=True)  # (N,) each
        log_ratio = self._log_ratio(logps - batch["old_logps"], batch)
        kl = kl_estimate(logps, batch["ref_logps"])
        losses = clipped_policy_loss(log_ratio, batch["advantages"], self.clip_low, self.clip_high) + self.beta * kl
        ratio, up = log_ratio.detach().exp(), batch["advantages"] > 0
        values = {
            "entropy": entropies,
            "clipped/low": (~up & (ratio < 1 - self.clip_low)).float(),
            "clipped/high": (up & (ratio > 1 + self.clip_high)).float(),
            "kl_estimate": kl,
        }
        return {"policy": self._aggregated(losses, batch), **metrics("tokens", values)}

    def _log_ratio(self, log_ratio: Tensor, batch: Batch) -> Tensor:
        """Log-ratio (N,) that weighs each token's advantage: the token's, or its sequence's."""
        if self.ratio == "token":
            return log_ratio
        ratios = _row_means(log_ratio, batch) if self.ratio == "sequence_mean" else row_sums(log_ratio, batch)
        return ratios[row_numbers(batch)]  # (S,) -> (N,)

    def _aggregated(self, losses: Tensor, batch: Batch) -> Term:
        """The losses (N,) of the tokens as one term. `aggregate` says what it is divided by."""
        n = len(batch["ids"])
        if self.aggregate == "sequences":
            return Term(_row_means(losses, batch)[:n], n, "sequences")
        return Term(losses, len(losses) if self.aggregate == "tokens" else n * self.max_new_tokens, self.aggregate)


def _row_means(values: Tensor, batch: Batch) -> Tensor:
    """Mean (S,) over each sequence of `values` (N,)."""
    return row_sums(values, batch) / row_sums(torch.ones_like(values), batch).clamp(min=1)


def advantages(rewards: list[float], kind: Advantage) -> list[float]:
    """Advantage of each completion of one prompt, from their rewards.

    >>> advantages([1.0, 0.0, 0.0], "group_no_std"), advantages([1.0, 0.0, 0.0], "rloo")
    ([0.6666666666666667, -0.3333333333333333, -0.3333333333333333], [1.0, -0.5, -0.5])
    """
    if kind == "reinforce":
        return rewards
    n, mean = len(rewards), sum(rewards) / max(len(rewards), 1)
    centred = [reward - mean for reward in rewards]
    if kind == "group_no_std" or n < 2:
        return centred
    if kind == "rloo":
        return [n / (n - 1) * value for value in centred]
    return [value / (float(np.std(rewards, ddof=1)) + 1e-4) for value in centred]
