"""Generation on a CPU with copies of the weights in oneDNN's own layout, low-rank updates added in.

The products of generation have few rows each, so reading the weights is what takes their time.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ftcore.kernels.lora_linear import LoraLinear
from ftcore.kernels.matmul import onednn_takes

# Bytes of copies above which there are none. Not a share of free memory, which changes from run to run, and last digits with it.
LARGEST = 4 * 2**30
# Rows for which oneDNN chooses the layout.
ROWS = 64


@contextmanager
def packed(network: nn.Module) -> Iterator[None]:
    """Inside, linear layers of `network` in float32 on a CPU multiply by such copies, made at its beginning; no gradients."""
    layers = [layer for layer in dict.fromkeys(_linear_layers(network)) if onednn_takes(layer.weight)]
    if sum(layer.weight.nbytes for layer in layers) > LARGEST or torch.is_autocast_enabled("cpu"):
        layers = []
    with torch.no_grad():
        try:
            for layer in layers:
                layer.forward = _Product(layer)  # type: ignore[assignment,method-assign]
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)


def _linear_layers(module: nn.Module) -> Iterator[nn.Linear | LoraLinear]:
    if type(module) is nn.Linear or (isinstance(module, LoraLinear) and module.is_plain()):
        yield module
    else:
        for child in module.children():
            yield from _linear_layers(child)


class _Product:
    """What a linear layer gives for x (..., in), as long as its weights stay."""

    def __init__(self, layer: nn.Linear | LoraLinear) -> None:
        weight = layer.updated_weight() if isinstance(layer, LoraLinear) else layer.weight
        self.size, self.bias = len(weight), layer.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], self.size)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]
