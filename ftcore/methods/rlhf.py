"""Reinforcement learning from human feedback: PPO against a learned reward model (Ouyang et al. 2022, arXiv:2203.02155).

A completion's reward is the reward model's score at its last token, less beta (log p - log p_ref) at each token: the policy
stays near where it began. A value head on the policy's last hidden state predicts what is still to come; advantages
are generalised (Schulman et al. 2016) and whitened over the step. Policy and value losses are clipped (Schulman et al. 2017,
arXiv:1707.06347). The policy and the reward model are runs of their own (stages), made when they are not given.
"""

from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from ftcore.data.sources import Row
from ftcore.methods.base import Term
from ftcore.methods.losses import clipped_policy_loss, clipped_value_loss, generalized_advantages, whitened
from ftcore.methods.online import OnlineMethod, Parts, Rollouts, Sample, add_numbers, in_order
from ftcore.methods.reward_model import RewardModel
from ftcore.models.logprobs import hidden_at, predicted, token_outputs
from ftcore.settings import PathOfWeights


class ValuedRollouts(Rollouts):
    """What the value loss needs too."""

    old_values: Tensor  # (N,): predicted when the tokens were sampled
    returns: Tensor  # (N,): what the values should have been


class RLHF(OnlineMethod[ValuedRollouts]):
    """Raises the reward model's score of what the policy writes, at a price for moving away from where it began."""

    token_names = ("old_logps", "advantages", "old_values", "returns")

    def __init__(
        self,
        *given: Any,
        policy: PathOfWeights,
        reward_model: PathOfWeights,
        stages: dict[str, list[str]],
        clip: Annotated[float, Gt(0), Le(1)],
        value_clip: Annotated[float, Gt(0)],
        value_weight: Annotated[float, Gt(0)],
        gamma: Annotated[float, Gt(0), Le(1)],
        lam: Annotated[float, Ge(0), Le(1)],
        unfinished_penalty: Annotated[float, Ge(0)],
        **shared: Any,
    ) -> None:
        super().__init__(*given, **shared)
        assert reward_model, "the stages come first"
        self.clip, self.value_clip, self.value_weight = clip, value_clip, value_weight
        self.gamma, self.lam, self.unfinished_penalty = gamma, lam, unfinished_penalty
        self.reward_model = RewardModel(reward_model, self.encoder)
        self.value_head = torch.nn.Linear(self.network.config.get_text_config().hidden_size, 1)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    def rewards(self, rows: list[Row], texts: list[str], ids: list[list[int]]) -> tuple[list[float | None], Parts]:
        """Scores of the reward model."""
        scores = self.reward_model.score(rows, texts, self.micro_batch_size, self.network_device)
        return list(scores), {}

    @torch.no_grad()
    def annotate(self, samples: list[Sample]) -> None:
        """Add the values that the policy expects before each token."""
        super().annotate(samples)
        batch = self.sequences(samples)
        hidden = hidden_at(self.network, batch, predicted(batch)[0])  # (N, H)
        add_numbers(in_order(samples, batch), "old_values", self._values(hidden).tolist())

    def advise(self, groups: list[list[Sample]]) -> list[Sample]:
        """Advantages and returns of each token, the advantages whitened over the step."""
        samples = [one for group in groups for one in group]
        if not samples:
            return []
        for one in samples:
            values = torch.tensor(one.tokens["old_values"])  # (T,), of this completion
            advantages = generalized_advantages(self._token_rewards(one), values, self.gamma, self.lam)
            one.tokens |= {"advantages": advantages.tolist(), "returns": (advantages + values).tolist()}
        together = torch.tensor([x for one in samples for x in one.tokens["advantages"]])  # (N,), of the whole step
        add_numbers(samples, "advantages", whitened(together).tolist())
        return samples

    def _token_rewards(self, one: Sample) -> Tensor:
        """Price (T,) of the KL at each token, and at the last one the score."""
        logps, ref_logps = torch.tensor(one.tokens["old_logps"]), torch.tensor(one.tokens["ref_logps"])
        rewards = -self.beta * (logps - ref_logps)
        assert one.reward is not None
        rewards[-1] += one.reward - self.unfinished_penalty * (not one.completion.finished)
        return rewards

    def _values(self, hidden: Tensor) -> Tensor:
        """Values (N,) that the head reads from last hidden states (N, H)."""
        return self.value_head(hidden.to(self.value_head.weight.dtype))[:, 0].float()

    def loss(self, batch: ValuedRollouts) -> dict[str, Term]:
        """Clipped policy loss and clipped value loss, averaged over the step's tokens."""
        scores = token_outputs(self.network, batch, self.temperature, entropies=True)
        log_ratio, values = scores.logps - batch["old_logps"], self._values(scores.hidden)  # (N,) each
        policy = clipped_policy_loss(log_ratio, batch["advantages"], self.clip, self.clip)
        value = clipped_value_loss(values, batch["old_values"], batch["returns"], self.value_clip)
        n = len(log_ratio)
        with torch.no_grad():
            clipped = ((log_ratio.exp() - 1).abs() > self.clip).float()
        return {
            "policy": Term(policy, n, "tokens"),
            "value": Term(value, n, "tokens", self.value_weight),
            "entropy": Term(scores.entropies, n, "tokens", 0.0),
            "clipped": Term(clipped, n, "tokens", 0.0),
        }
