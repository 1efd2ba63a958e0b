"""Tensors without storage: shapes, types and lifetimes are those of a real run, and nothing is computed.

FakeTensorMode does that for tensors. What the host reads from one (`.item()`, the places of a mask) has no answer there; here it
gets one that leaves as much in memory as any other could.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


@contextmanager
def without_storage() -> Iterator[FakeTensorMode]:
    """Inside, new tensors have no storage, and what the host reads from them is made up."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _HostReads():
        yield mode


def faked(batch: Any, mode: FakeTensorMode) -> Any:
    """A batch of real tensors, or any tree of them, without storage."""
    return tree_map_only(Tensor, mode.from_tensor, batch)


def allocate(network: nn.Module, device: str = "cpu") -> None:
    """Replace parameters and buffers on the meta device by fake ones. Tied ones stay tied."""
    made: dict[int, Tensor] = {}

    def fake(value: Tensor) -> Tensor:
        if id(value) not in made:
            new = torch.empty(value.shape, dtype=value.dtype, device=device)
            made[id(value)] = nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new
        return made[id(value)]

    for module in network.modules():
        for values in (module._parameters, module._buffers):
            replaced = {name: fake(value) for name, value in values.items() if value is not None and value.is_meta}
            values.update(replaced)  # type: ignore[arg-type]


class _HostReads(TorchDispatchMode):
    """Answers operations whose result depends on values: 1 or True for a number, all places for a mask."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if (answer := ANSWERS.get(function)) and isinstance(args[0], FakeTensor):
            return answer(*args)
        return function(*args, **(kwargs or {}))


def _one(value: Tensor) -> bool | int | float:
    """1 in the number format of a tensor."""
    return 1.0 if value.is_floating_point() else value.dtype is torch.bool or 1


ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _one,
    aten.equal.default: lambda *_: True,
    aten.nonzero.default: lambda value: value.new_empty((value.numel(), value.dim()), dtype=torch.long),
}
