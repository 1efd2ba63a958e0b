"""Reinforcement learning from human feedback: PPO against a learned reward model (Ouyang et al. 2022, arXiv:2203.02155).

A completion's reward is the reward model's score at its last token, less beta (log p - log p_ref) at each token: the policy
stays close to the base model. A value head on the policy's last hidden state predicts the rewards still to come; advantages
are generalised (Schulman et al. 2016) and whitened over the step. Policy and value losses are clipped (Schulman et al. 2017,
arXiv:1707.06347). The policy and the reward model are runs of their own (stages), made when they are not given.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ftcore.data.layouts import Batch
from ftcore.data.sources import Row
from ftcore.machine.processes import gathered
from ftcore.methods.base import Clip, Fraction, NonNegative, Positive, PositiveFraction
from ftcore.methods.losses import clipped_policy_loss, clipped_value_loss, generalized_advantages, moments, whitened
from ftcore.methods.online import OnlineMethod, Rollouts
from ftcore.methods.terms import Term, metrics
from ftcore.models.logprobs import hidden_at, predicted, token_outputs
from ftcore.rewards.functions import Scored
from ftcore.rollout.samples import Sample, set_per_token, whole
from ftcore.settings import PathOfWeights


class RLHF(OnlineMethod):
    """Raises the reward model's score of the policy's completions, with a penalty for leaving the base model."""

    per_token_names = ("old_logps", "advantages", "old_values", "returns")

    policy: PathOfWeights
    reward_model: PathOfWeights
    stages: dict[str, list[str]]
    clip: PositiveFraction
    value_clip: Clip
    value_weight: Positive
    gamma: PositiveFraction
    lam: Fraction
    unfinished_penalty: NonNegative

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.reward_model, "runs/ trains or finds it before the method is built"
        self.scorer = self.context.reward_model(self.reward_model, self.encoder, self.context.precision)
        self.value_head = torch.nn.Linear(self.network.config.get_text_config().hidden_size, 1)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    def compute_rewards(self, rows: list[Row], texts: list[str], ids: list[list[int]]) -> Scored:
        """Scores of the reward model."""
        return list(self.model_scores(rows, texts)), {}

    @torch.no_grad()
    def compute_per_token(self, samples: list[Sample], batch: Batch) -> None:
        """Also add the values that the value head predicts before each token."""
        super().compute_per_token(samples, batch)
        hidden = hidden_at(self.network, batch, predicted(batch)[0])  # (N, H)
        set_per_token(samples, "old_values", self._values(hidden))

    def compute_advantages(self, groups: list[list[Sample]]) -> list[Sample]:
        """Advantages and returns of each token. The advantages are whitened over the step."""
        samples = [one for group in groups for one in group]
        own, advantages = whole(samples), torch.empty(0)
        if own:
            values, lengths = _column(own, "old_values"), torch.tensor([one.trained for one in own])
            there = torch.arange(values.shape[1]) < lengths[:, None]  # (S, T)
            padded = generalized_advantages(self._token_rewards(own), values, self.gamma, self.lam)
            advantages = padded[there]
            set_per_token(own, "returns", (padded + values)[there])
        if samples:
            set_per_token(own, "advantages", whitened(advantages, gathered(moments(advantages))))
        return samples

    def _token_rewards(self, samples: list[Sample]) -> Tensor:
        """The KL penalty at each token, plus the score at the last, (S, T) with zeros after it."""
        rewards = -self.beta * (_column(samples, "old_logps") - _column(samples, "ref_logps"))
        scores = [(one.reward or 0.0) - self.unfinished_penalty * one.truncated for one in samples]
        rewards[range(len(samples)), [one.trained - 1 for one in samples]] += torch.tensor(scores)
        return rewards

    def _values(self, hidden: Tensor) -> Tensor:
        """Values (N,) that the head predicts from last hidden states (N, H)."""
        with torch.autocast(hidden.device.type, enabled=False):  # returns and advantages are differences of values
            return self.value_head(hidden.float())[:, 0].float()

    def loss(self, batch: Rollouts) -> dict[str, Term]:
        """Clipped policy loss and clipped value loss, averaged over the step's tokens."""
        scores = token_outputs(self.network, batch, self.temperature, entropies=True)
        log_ratio, values = scores.logps - batch["old_logps"], self._values(scores.hidden)  # (N,) each
        policy = clipped_policy_loss(log_ratio, batch["advantages"], self.clip, self.clip)
        value = clipped_value_loss(values, batch["old_values"], batch["returns"], self.value_clip)
        clipped = ((log_ratio.exp() - 1).abs() > self.clip).float()
        return {
            "policy": Term(policy, len(policy), "tokens"),
            "value": Term(value, len(value), "tokens", self.value_weight),
            **metrics("tokens", {"entropy": scores.entropies, "clipped": clipped}),
        }


def _column(samples: list[Sample], name: str) -> Tensor:
    """Numbers per token (S, T) of the samples, with zeros after each one's end."""
    return pad_sequence([torch.from_numpy(one.per_token[name]) for one in samples], batch_first=True)
