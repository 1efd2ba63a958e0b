"""Frozen linear layers as bitsandbytes keeps them (NF4, Dettmers et al. 2023, arXiv:2305.14314), as far as memory goes.

Half a byte for a weight and a float32 scale for each block of 64; for a matmul, forward and backward, a layer's weights are made
bf16 for a moment. bitsandbytes itself needs a GPU.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from ftcore.models.blocks import transformer_blocks

BLOCK = 64


def in_four_bits(network: nn.Module) -> None:
    """Replace the frozen linear layers of the blocks; those around them stay as they are, as bitsandbytes leaves them."""
    for block in transformer_blocks(network):
        for layer in block.modules():
            if isinstance(layer, Linear):
                layer.__class__ = Linear  # peft's own forward, as with bitsandbytes
                layer.base_layer = FourBit(layer.base_layer)  # type: ignore[arg-type]


class FourBit(nn.Module):
    """A linear layer without gradient for its weights."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        packed = torch.empty(layer.weight.numel() // 2, dtype=torch.uint8, device=layer.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scales", torch.empty(layer.weight.numel() // BLOCK, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Output (..., out) of `x` (..., in)."""
        y: Tensor = _Multiplied.apply(x.to(torch.bfloat16), self.weight, self.out_features)
        return y if self.bias is None else y + self.bias


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, out: int) -> Tensor:
        ctx.shape = out, x.shape[-1]
        return x @ _unpacked(x, ctx.shape).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ _unpacked(grads[0], ctx.shape), None, None


def _unpacked(like: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=like.device)
