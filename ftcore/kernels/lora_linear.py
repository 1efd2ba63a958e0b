"""A linear layer with a low-rank update. Values and gradients are those of peft's layer, with fewer passes over memory.

y = x W^T + s (x A^T) B^T (Hu et al. 2021, arXiv:2106.09685, equation 3). The update is added to y in place by its matmul, and
likewise to the gradient of x.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor


class LoraLinear(Linear):
    """peft's layer. It leaves dropout, DoRA, several adapters and merged weights to peft's own forward.

    Under autocast x, W, A and B are cast, W only where it is kept in another format; gradients of A and B are float32 again.
    """

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Output (..., out) of `x` (..., in)."""
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if args or kwargs or not (autocast or dtype == self.base_layer.weight.dtype) or not self.is_plain():
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        rows, (name,) = x.reshape(-1, x.shape[-1]).to(dtype), self.active_adapters
        layer: torch.nn.Linear = self.base_layer  # type: ignore[assignment]
        w = layer.weight.to(dtype)
        if self.disable_adapters:
            y = rows @ w.T  # not the layer itself: a fused bias rounds differently from `_Updated`
        else:
            a, b = (part[name].weight.to(dtype) for part in (self.lora_A, self.lora_B))
            y = _Updated.apply(rows, w, a, b, self.scaling[name])
        y = y if layer.bias is None else y.add_(layer.bias)
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]

    def is_plain(self) -> bool:
        """Whether the layer is a frozen W, with or without bias, and one update."""
        (name, *others), layer = self.active_adapters, self.base_layer
        extras = others or self.merged or self.lora_variant or self.lora_bias[name]
        frozen = not any(parameter.requires_grad for parameter in layer.parameters())
        return not extras and frozen and isinstance(self.lora_dropout[name], torch.nn.Identity)

    def updated_weight(self) -> Tensor:
        """W + s B A (out, in), or W while the adapter is disabled."""
        weight = self.base_layer.weight
        return weight if self.disable_adapters else weight + self.get_delta_weight(self.active_adapters[0])  # type: ignore[operator,return-value]


class _Updated(torch.autograd.Function):
    """x W^T + s (x A^T) B^T (rows, out) for x (rows, in), W (out, in), A (rank, in) and B (out, rank). W does not train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = x @ a.T  # (rows, rank)
        ctx.save_for_backward(x, w, a, b, inner)
        ctx.scale = scale
        return (x @ w.T).addmm_(inner, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, inner = ctx.saved_tensors
        to_inner = (grads[0] @ b).mul_(ctx.scale)  # (rows, rank)
        to_x = (grads[0] @ w).addmm_(to_inner, a) if ctx.needs_input_grad[0] else None
        return to_x, None, to_inner.T @ x, (grads[0].T @ inner).mul_(ctx.scale), None
