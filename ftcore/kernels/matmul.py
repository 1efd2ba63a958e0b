"""Matmuls on a CPU, by the faster of the two libraries that torch ships.

oneDNN uses AVX-512 on every processor that has it, MKL only on Intel's. With AVX2, MKL is 1.1 to 1.2 times as fast (dev/LOG.md).
"""

from typing import Any

import torch
from torch import Tensor

# Types of tensors that hold all their values, unlike DTensor.
UNSHARDED = (Tensor, torch.nn.Parameter)
ONEDNN_IS_FASTER = torch.backends.cpu.get_cpu_capability() == "AVX512"


def times(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows` (N, in) times the transpose of `weight` (out, in): (N, out). No gradient."""
    if ONEDNN_IS_FASTER and onednn_takes(rows, weight):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")  # type: ignore[no-any-return]
    return rows @ weight.T


def onednn_takes(*matrices: Tensor) -> bool:
    """Whether oneDNN multiplies such matrices: float32, on a CPU, unsharded, not empty."""
    return torch.backends.mkldnn.is_available() and all(
        matrix.dtype == torch.float32 and matrix.device.type == "cpu" and matrix.numel() and type(matrix) in UNSHARDED
        for matrix in matrices
    )


class Times(torch.autograd.Function):
    """`times` with gradients to both."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return times(rows, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        return times(grads[0], weight.T), times(grads[0].T, rows.T)
