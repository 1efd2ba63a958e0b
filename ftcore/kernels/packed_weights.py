"""Faster generation, with copies of the weights: low-rank updates are added in, and on a CPU the layout is oneDNN's own.

A matmul of generation has few rows, so most of its time goes into reading the weights and, on a GPU, into starting kernels. The
frozen weights themselves stay as they are: adding an update to them and taking it away again would change last bits.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ftcore.kernels.lora_linear import LoraLinear

# No copies if they would be larger (bytes; on a GPU, a share of all its memory). Not a share of what is free: that differs from
# run to run, and so would last digits.
LARGEST = 4 * 2**30
LARGEST_SHARE = 0.25
Layer = nn.Linear | LoraLinear
Forward = Callable[[Tensor], Tensor]
# Types of weights that hold all their values, unlike DTensor.
UNSHARDED = (Tensor, nn.Parameter)
# Rows of x that oneDNN chooses the layout for.
ROWS = 64


@contextmanager
def packed_weights(network: nn.Module) -> Iterator[None]:
    """Inside, linear layers of `network` use copies of the weights they have now; no gradients.

    These are the float32 layers on a CPU, and elsewhere those with a low-rank update.
    """
    found = {layer: _forward_of(layer) for layer in dict.fromkeys(linear_layers(network))}
    layers = {layer: make for layer, make in found.items() if make}
    if sum(layer.weight.nbytes for layer in layers) > _most(layers):
        layers = {}
    with torch.no_grad():
        try:
            for layer, make in layers.items():
                layer.forward = make(layer)  # type: ignore[assignment,method-assign]
            yield
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)


def _most(layers: Iterable[Layer]) -> float:
    """The most bytes that copies of these layers may have."""
    weight = next((layer.weight for layer in layers), None)
    if weight is None or not weight.is_cuda:
        return LARGEST
    return LARGEST_SHARE * torch.cuda.get_device_properties(weight.device).total_memory


def _forward_of(layer: Layer) -> Callable[[Layer], Forward] | None:
    """What makes a faster forward of this layer; None where nothing does."""
    weight = layer.weight
    if type(weight) not in UNSHARDED or not weight.is_floating_point() or not weight.numel():
        return None  # also 4-bit weights
    autocast, cpu = torch.is_autocast_enabled(weight.device.type), weight.device.type == "cpu"
    if cpu and weight.dtype == torch.float32 and not autocast and torch.backends.mkldnn.is_available():
        return _packed_forward
    return _merged_forward if isinstance(layer, LoraLinear) and not layer.disable_adapters else None


def linear_layers(module: nn.Module) -> Iterator[Layer]:
    """The layers of a network that copies may serve."""
    if type(module) is nn.Linear or (isinstance(module, LoraLinear) and module.is_plain()):
        yield module
    else:
        for child in module.children():
            yield from linear_layers(child)


def _merged_forward(layer: Layer) -> Forward:
    """The layer's forward for x (..., in), with its update added to a copy of its weight, in the type that is computed in."""
    assert isinstance(layer, LoraLinear)
    kind = layer.weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.weight.dtype
    return partial(nn.functional.linear, weight=layer.updated_weight().to(dtype), bias=layer.bias)


def _packed_forward(layer: Layer) -> Forward:
    """The layer's forward for x (..., in), with a packed copy of its weight."""
    weight = layer.updated_weight() if isinstance(layer, LoraLinear) else layer.weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    return partial(torch.ops.mkldnn._linear_pointwise, W=packed, B=layer.bias, attr="none", scalars=[], algorithm="")
