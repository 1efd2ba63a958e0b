"""Losses: pure functions of tensors, with one value per token, pair or row. Nothing here knows a config or a module."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid


def token_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL divergence from the reference distribution to the policy's, summed over positions, in nats.

    sum_n sum_v p_ref(v) (log p_ref(v) - log p(v)). Both arguments are (N, V); the reference carries no gradient.

    >>> float(token_kl(torch.zeros(3, 5), torch.zeros(3, 5)))
    0.0
    """
    logps, reference_logps = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    return kl_div(logps, reference_logps.detach(), reduction="sum", log_target=True)


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, smoothing: float = 0.0) -> Tensor:
    """-log of the probability (P,) that the chosen answer beats the rejected one by `margin`: sigmoid of the difference.

    `smoothing` is the assumed fraction of swapped labels (conservative DPO, Mitchell 2023).

    >>> round(float(bradley_terry(torch.zeros(1), torch.zeros(1))), 4)  # no difference: log 2
    0.6931
    """
    difference = chosen - rejected - margin
    return -logsigmoid(difference) * (1 - smoothing) - logsigmoid(-difference) * smoothing


def log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) (P,) of p = exp(mean log-probability per token), which ORPO compares. Finite even if p is 1."""
    mean_logps = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return mean_logps - (-torch.expm1(mean_logps)).log()


def kl_estimate(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per-token estimate (N,) of KL(policy || reference) from the sampled tokens: r - 1 - log r, r = p_ref / p.

    Unbiased when the tokens are the policy's own and never negative (Schulman 2020, "k3").
    """
    log_ratio = ref_logps - logps
    return log_ratio.exp() - 1 - log_ratio


def clipped_policy_loss(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) per element, r = exp(log_ratio) (Schulman et al. 2017, eq. 7)."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the larger squared error (N,): of the values, or of the values clipped to within `clip` of the old ones."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def generalized_advantages(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages (S, T): A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t. V is 0 after the end.

    Both arguments are (S, T), a completion in each row, with zeros after its end. Schulman et al. 2016, "High-dimensional
    continuous control using generalized advantage estimation", eq. 16.
    """
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)  # (S, T): V_{t+1}
    advantages = list((rewards + gamma * following - values).unbind(1))  # T times (S,): d_t, from the last on A_t
    for t in reversed(range(len(advantages) - 1)):
        advantages[t] = advantages[t] + gamma * lam * advantages[t + 1]
    return torch.stack(advantages, dim=1)


def moments(values: Tensor) -> Tensor:
    """Count, mean and variance (3,) of values (N,), in float64: that of the whole from those of its parts."""
    values = values.double()
    return torch.stack([torch.tensor(float(len(values))), values.mean(), values.var(unbiased=False)])


def whitened(values: Tensor, parts: list[Tensor]) -> Tensor:
    """Values (N,) shifted and scaled so that the whole, whose `parts` have these moments, gets mean 0 and variance 1.

    >>> whitened(torch.tensor([1.0, 3.0]), [moments(torch.tensor([1.0, 3.0]))])
    tensor([-1.,  1.])
    """
    counts, means, variances = torch.stack([part for part in parts if part[0]]).unbind(1)  # (K,) each
    mean = (counts * means).sum() / counts.sum()
    variance = (counts * (variances + (means - mean) ** 2)).sum() / counts.sum()
    return ((values - mean) / (variance + 1e-8).sqrt()).float()
