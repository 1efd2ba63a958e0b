"""Matmuls by either library give what a plain one gives, with gradients, also of empty matrices."""

import pytest
import torch

from ftcore.kernels import matmul
from ftcore.kernels.matmul import Times, times


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("shape", [(0, 8, 5), (1, 8, 5), (16, 8, 5), (100, 64, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_a_plain_matmul(shape, dtype, onednn, monkeypatch):
    monkeypatch.setattr(matmul, "ONEDNN_IS_FASTER", onednn)
    torch.manual_seed(0)
    rows, inner, out = shape
    x, w = torch.randn(rows, inner, dtype=dtype), torch.randn(out, inner, dtype=dtype)
    torch.testing.assert_close(times(x, w), x @ w.T)
    torch.testing.assert_close(times(x, w.T.contiguous().T), x @ w.T)  # a transposed weight, as gradients need it
    slope, sides = torch.randn(rows, out, dtype=dtype), []
    for multiply in (Times.apply, lambda a, b: a @ b.T):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        (multiply(a, b) * slope).sum().backward()
        sides.append((a.grad, b.grad))
    for got, expected in zip(*sides, strict=True):
        torch.testing.assert_close(got, expected)
