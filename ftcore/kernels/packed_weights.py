"""Faster generation on a CPU, with copies of the weights in oneDNN's own layout; low-rank updates are added in.

A matmul of generation has few rows, so most of its time goes into reading the weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ftcore.kernels.lora_linear import LoraLinear

# No copies if they would be larger (bytes). Not a share of free memory: that differs from run to run, and so would last digits.
LARGEST = 4 * 2**30
# Types of weights that hold all their values, unlike DTensor.
UNSHARDED = (Tensor, nn.Parameter)
# Rows of x that oneDNN chooses the layout for.
ROWS = 64


@contextmanager
def packed_weights(network: nn.Module) -> Iterator[None]:
    """Inside, the float32 CPU linear layers of `network` use packed copies of the weights they have now; no gradients."""
    layers = [layer for layer in dict.fromkeys(_linear_layers(network)) if _onednn_takes(layer.weight)]
    if sum(layer.weight.nbytes for layer in layers) > LARGEST or torch.is_autocast_enabled("cpu"):
        layers = []
    with torch.no_grad():
        try:
            for layer in layers:
                layer.forward = _packed_forward(layer)  # type: ignore[assignment,method-assign]
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)


def _onednn_takes(weight: Tensor) -> bool:
    here = torch.backends.mkldnn.is_available() and weight.device.type == "cpu" and type(weight) in UNSHARDED
    return here and weight.dtype == torch.float32 and weight.numel() > 0


def _linear_layers(module: nn.Module) -> Iterator[nn.Linear | LoraLinear]:
    if type(module) is nn.Linear or (isinstance(module, LoraLinear) and module.is_plain()):
        yield module
    else:
        for child in module.children():
            yield from _linear_layers(child)


def _packed_forward(layer: nn.Linear | LoraLinear) -> Callable[[Tensor], Tensor]:
    """The layer's forward for x (..., in), with a packed copy of its weight."""
    weight = layer.updated_weight() if isinstance(layer, LoraLinear) else layer.weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    return partial(torch.ops.mkldnn._linear_pointwise, W=packed, B=layer.bias, attr="none", scalars=[], algorithm="")
