"""Log-probabilities from hidden states, a piece of the tokens at a time: the logits of all of them never exist together.

With p = softmax(W h / T), d log p(y) / dh = (W[y] - W^T p) / T. Where the projection W is not trained, that is computed beside
the value, while a piece's logits are at hand, and nothing but it is kept for the backward pass. A projection that is trained has
the logits of a piece computed again there. The idea of pieces is that of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989).
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ftcore.kernels.matmul import Times, times

# Tokens in a piece. Logits of 256 tokens over 50,000 words are 50 MB.
PIECE = 256
_PLAIN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def target_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropies: bool
) -> tuple[Tensor, Tensor]:
    """(log-probability (N,) of `targets` (N,), entropies (N,) in nats without gradient, or nothing (0,)).

    `hidden` is (N, H), `weight` (V, H).
    """
    if not weight.requires_grad:
        return _TargetScores.apply(hidden, weight, targets, temperature, entropies)  # type: ignore[no-any-return]
    given = [(h, weight, y, temperature, entropies) for h, y in _pieces(hidden, targets)]
    again = (
        [checkpoint(_logged, *one, use_reentrant=False) for one in given] if len(given) > 1 else [_logged(*given[0])]
    )
    logps, information = zip(*again, strict=True)
    return torch.cat(logps), torch.cat(information)


def _pieces(hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(hidden.split(PIECE), targets.split(PIECE), strict=True))


def _logged(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropies: bool
) -> tuple[Tensor, Tensor]:
    """A piece for autograd, by the operations of `_scored`: policy and reference that are equal give equal values."""
    logits = Times.apply(hidden, weight).float()  # (N, V)
    logits = logits / temperature if temperature != 1 else logits
    top = logits.detach().amax(-1, keepdim=True)  # (N, 1)
    shifted = logits - top  # so that no exponential overflows
    likely = shifted.exp()
    total = likely.sum(-1, keepdim=True)
    with torch.no_grad():
        information = _entropies(likely, shifted, total) if entropies else total.new_zeros(0)
    return (logits.gather(-1, targets[:, None]) - top - total.log())[:, 0], information


def _entropies(likely: Tensor, shifted: Tensor, total: Tensor) -> Tensor:
    """Entropies (N,) from exp(`shifted`) (N, V), `shifted` (N, V) and the sum (N, 1) of the first."""
    return total.log()[:, 0] - (likely * shifted).sum(-1) / total[:, 0]


class _TargetScores(torch.autograd.Function):
    """`target_scores` with the gradient of each token's value computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropies: bool
    ) -> tuple[Tensor, Tensor]:
        slopes = bool(ctx.needs_input_grad[0])
        parts = [_scored(h, weight, y, temperature, entropies, slopes) for h, y in _pieces(hidden, targets)]
        logps, information, gradient = map(torch.cat, zip(*parts, strict=True))  # (N,), (N,) or (0,), (N, H) or (0,)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(information)
        return logps, information

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grads[0][:, None] * gradient).to(gradient.dtype), None, None, None, None


def _scored(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropies: bool, slopes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and gradients of a piece; its logits are overwritten step by step."""
    logits = times(hidden, weight).float()  # (N, V)
    if temperature != 1:
        logits.div_(temperature)
    chosen = logits.gather(-1, targets[:, None])
    top = logits.amax(-1, keepdim=True)  # (N, 1)
    shifted = logits.sub_(top)
    likely = shifted.exp() if entropies else shifted.exp_()  # (N, V), not yet divided by `total`
    total = likely.sum(-1, keepdim=True)
    information = _entropies(likely, shifted, total) if entropies else total.new_zeros(0)
    gradient = hidden.new_zeros(0)
    if slopes:
        mean = times(likely.to(weight.dtype), weight.T).float() / total  # (N, H): W^T p
        gradient = ((weight[targets].float() - mean) / temperature).to(hidden.dtype)
    return (chosen - top - total.log())[:, 0], information, gradient


def plain_weight(network: PreTrainedModel) -> Tensor | None:
    """Weight (V, H) of the output projection where it alone makes the logits; None for bias, soft caps, scales and shares."""
    head = network.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None or type(head.weight) is not torch.nn.Parameter:
        return None
    if network not in _PLAIN:
        _PLAIN[network] = _projects_only(network, head)
    return head.weight if _PLAIN[network] else None


@torch.no_grad()
def _projects_only(network: PreTrainedModel, head: torch.nn.Linear) -> bool:
    """Whether logits are the projection of the last hidden state: asked with a state so large that any cap would show."""
    random = torch.Generator().manual_seed(0)
    large = (1000 * torch.randn(1, 1, head.in_features, generator=random)).to(head.weight.device)
    hook = head.register_forward_pre_hook(lambda _, args: (large.to(args[0].dtype), *args[1:]))
    try:
        with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
            ids = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
            logits = network(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    return torch.equal(logits.float(), head(large.to(logits.dtype)).float())
