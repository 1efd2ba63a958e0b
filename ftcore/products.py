"""Matrix products on a CPU by oneDNN instead of the BLAS that torch links, which is slower, most where rows are few."""

from typing import Any

import torch
from torch import Tensor

# Not the pieces of sharded ones.
WHOLE = (Tensor, torch.nn.Parameter)


def times(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows` (N, in) times `weight` (out, in) transposed: (N, out). Without gradient."""
    if rows.numel() and by_onednn(rows, weight):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")  # type: ignore[no-any-return]
    return rows @ weight.T


def by_onednn(*matrices: Tensor) -> bool:
    """Whether oneDNN multiplies such matrices: whole ones of float32 on a CPU, with something in them."""
    return torch.backends.mkldnn.is_available() and all(
        matrix.dtype == torch.float32 and matrix.device.type == "cpu" and matrix.numel() and type(matrix) in WHOLE
        for matrix in matrices
    )


class Times(torch.autograd.Function):
    """`times` with gradients of both."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return times(rows, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = ctx.saved_tensors
        return times(grads[0], weight.T), times(grads[0].T, rows.T)
