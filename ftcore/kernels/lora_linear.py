"""A low-rank update beside a linear layer, in fewer passes over memory than peft's layer, whose values and gradients it has.

y = x W^T + s (x A^T) B^T (Hu et al. 2021, arXiv:2106.09685, equation 3). The update is added in place, by the product that makes
it, and the gradient of x likewise.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor

from ftcore.kernels.matmul import times


class LoraLinear(Linear):
    """peft's layer, which also does what this one does not: dropout, DoRA, several adapters, other precisions, merging."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Output (..., out) of `x` (..., in)."""
        autocast = torch.is_autocast_enabled(x.device.type)
        if args or kwargs or autocast or x.dtype != self.base_layer.weight.dtype or not self.is_plain():
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,), layer = self.active_adapters, self.base_layer
        off = self.disable_adapters
        update = (None, None, 0.0) if off else (self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
        return _Updated.apply(x, layer.weight, layer.bias, *update)  # type: ignore[no-any-return]

    def is_plain(self) -> bool:
        """Whether the layer is W and one update of the same precision, of which W does not train."""
        if self.merged or len(self.active_adapters) != 1 or self.lora_variant:
            return False
        (name,), layer = self.active_adapters, self.base_layer
        alike = layer.weight.dtype == self.lora_A[name].weight.dtype
        frozen = not layer.weight.requires_grad and (layer.bias is None or not layer.bias.requires_grad)
        whole = isinstance(self.lora_dropout[name], torch.nn.Identity) and not self.lora_bias[name]
        return alike and frozen and whole

    def updated_weight(self) -> Tensor:
        """W + s B A (out, in), or W where the update is switched off."""
        weight = self.base_layer.weight
        return weight if self.disable_adapters else weight + self.get_delta_weight(self.active_adapters[0])  # type: ignore[operator,return-value]


class _Updated(torch.autograd.Function):
    """The layer with its update, or without; W and its bias do not train."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (rows, in)
        y = times(rows, w)  # (rows, out)
        inner = None
        if a is not None and b is not None:
            inner = rows @ a.T  # (rows, rank)
            y.addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(rows if a is not None else None, w, a, b, inner)
        ctx.scale, ctx.shape = scale, x.shape
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], len(w))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, w, a, b, inner = ctx.saved_tensors
        slope = grads[0].reshape(-1, len(w))  # (rows, out)
        to_x = times(slope, w.T) if ctx.needs_input_grad[0] else None
        to_a = to_b = None
        if a is not None:
            reduced = (slope @ b).mul_(ctx.scale)  # (rows, rank)
            to_x = None if to_x is None else to_x.addmm_(reduced, a)
            to_a, to_b = reduced.T @ rows, (slope.T @ inner).mul_(ctx.scale)
        return None if to_x is None else to_x.view(ctx.shape), None, None, to_a, to_b, None
