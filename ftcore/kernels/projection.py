"""Log-probabilities from hidden states, a chunk of tokens at a time: the logits of all tokens never exist together.

With p = softmax(W h / T), d log p(y) / dh = (W[y] - W^T p) / T. Where the projection W is frozen, this gradient is computed
beside the value, while the chunk's logits are at hand, and is all that the backward pass needs. Where W trains, the backward pass
computes the logits of each chunk again. Chunks as in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Tokens in a chunk. Logits of 256 tokens over 50,000 words are 50 MB.
CHUNK = 256
Compute = Callable[..., tuple[Tensor, ...]]  # of one chunk: its log-probabilities and what goes with them
_ALONE: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def target_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropies: bool
) -> tuple[Tensor, Tensor]:
    """(log-probability (N,) of `targets` (N,), entropies (N,) in nats without gradient, (0,) unless asked for).

    `hidden` is (N, H), `weight` (V, H).
    """
    if not weight.requires_grad:
        return _FrozenProjection.apply(hidden, weight, targets, temperature, entropies)  # type: ignore[no-any-return]
    compute = partial(checkpoint, _chunk_logps, use_reentrant=False) if len(hidden) > CHUNK else _chunk_logps
    logps, entropy, _ = _in_chunks(compute, hidden, weight, targets, temperature, entropies)
    return logps, entropy


def _in_chunks(compute: Compute, hidden: Tensor, weight: Tensor, targets: Tensor, *options: float) -> Iterator[Tensor]:
    """Each output of `compute` over all chunks."""
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return map(torch.cat, zip(*(compute(h, weight, y, *options) for h, y in chunks), strict=True))


def _chunk_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropies: bool, with_gradient: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and gradients to `hidden` of one chunk; the last two are (0,) unless asked for."""
    shifted = (hidden @ weight.T).float()  # (N, V)
    if temperature != 1:
        shifted.div_(temperature)
    shifted.sub_(shifted.detach().amax(-1, keepdim=True))  # so that no exponential overflows
    logps = shifted.gather(-1, targets[:, None])  # (N, 1)
    exps = shifted.exp() if entropies or shifted.requires_grad else shifted.exp_()  # p is exps / total
    total = exps.sum(-1, keepdim=True)  # (N, 1)
    logps = (logps - total.log())[:, 0]
    entropy = gradient = total.new_zeros(0)
    with torch.no_grad():
        if entropies:
            entropy = total.log()[:, 0] - (exps * shifted).sum(-1) / total[:, 0]
        if with_gradient:
            mean = (exps.to(weight.dtype) @ weight).float() / total  # (N, H): W^T p
            gradient = ((weight[targets].float() - mean) / temperature).to(hidden.dtype)
    return logps, entropy, gradient


class _FrozenProjection(torch.autograd.Function):
    """`target_logps` with the gradient to each hidden state computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, *options: float) -> tuple[Tensor, Tensor]:
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))  # once, not for every chunk
        logps, entropy, gradient = _in_chunks(_chunk_logps, hidden, weight, targets, *options, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grads[0][:, None] * gradient).to(gradient.dtype), None, None, None, None


def projects_alone(network: PreTrainedModel) -> bool:
    """Whether the output projection alone makes the logits: no bias, soft cap or scale. Tried once.

    Trying takes a forward pass: of sharded weights, in all processes.
    """
    if network not in _ALONE:
        projection = network.get_output_embeddings()
        _ALONE[network] = (
            type(projection) is torch.nn.Linear and projection.bias is None and _tried(network, projection)
        )
    return _ALONE[network]


@torch.no_grad()
@torch.random.fork_rng()
def _tried(network: PreTrainedModel, projection: torch.nn.Linear) -> bool:
    """Whether logits are what the projection gave, for a last hidden state so large that any cap would show."""
    device, random = network.device, torch.Generator().manual_seed(0)
    large = (1000 * torch.randn(1, 1, projection.in_features, generator=random)).to(device)
    given: list[Tensor] = []
    enter = projection.register_forward_pre_hook(lambda _, args: (large.to(args[0].dtype), *args[1:]))
    leave = projection.register_forward_hook(lambda _, args, output: given.append(output))
    with enter, leave, torch.compiler.set_stance("force_eager"):
        logits = network(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False).logits
    return torch.equal(logits.float(), given[0].float())
