"""Losses: pure functions of tensors, each a sum and what it is a sum over. Nothing here knows a config or a module."""

import torch
from torch import Tensor


def token_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL divergence from the reference distribution to the policy's, summed over positions, in nats.

    sum_n sum_v p_ref(v) (log p_ref(v) - log p(v)). Both arguments are (N, V); the reference carries no gradient.

    >>> float(token_kl(torch.zeros(3, 5), torch.zeros(3, 5)))
    0.0
    """
    logps, reference_logps = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    return torch.nn.functional.kl_div(logps, reference_logps.detach(), reduction="sum", log_target=True)


def negative_log_likelihood(logps: Tensor) -> Tensor:
    """Sum of -log p over the tokens of `logps` (N,), in nats."""
    return -logps.sum()
