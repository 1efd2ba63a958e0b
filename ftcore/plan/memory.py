"""Follows every storage that a step holds, by what it is for, and keeps what there was when most was held.

torch's MemTracker does that module by module; it cannot follow frozen parameters and takes ten times as long.
"""

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ftcore.models.sharding import local

Kind = Literal["weights", "gathered", "gradients", "optimizer", "activations", "temporary"]
# CUDA's allocator rounds every block up to this many bytes.
ROUNDED = 512
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# torch's table and the CPU's attention. That a causal mask saves half of it counts for nothing, as is usual for shares of a peak.
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    _attention: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    _attention_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape),
}


class Held(TorchDispatchMode):
    """The bytes that live tensors hold by kind, now and at the peak, and what made them. New tensors are of `kind`."""

    def __init__(self) -> None:
        super().__init__()
        self.kind: Kind = "activations"
        self.sizes: dict[int, tuple[Kind, int]] = {}  # of each storage
        self.now, self.peak = Counter[Kind](), Counter[Kind]()
        self.flops, self.sent, self.operations = Counter[str](), Counter[str](), 0

    def start(self, kind: Kind) -> None:
        """Look for a new peak, and count anew."""
        self.kind, self.peak, self.flops, self.sent = kind, self.now.copy(), Counter(), Counter()
        self.operations = 0

    def see(self, tensors: Iterable[Tensor | None], kind: Kind) -> None:
        """Count tensors that were made elsewhere, or turn out to be of another kind."""
        for tensor in tensors:
            if tensor is not None:
                self._see(local(tensor.detach()).untyped_storage(), kind)

    def _see(self, storage: torch.UntypedStorage, kind: Kind | None = None) -> None:
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self._forget, key)
            self._keep(key, kind or self.kind, storage.nbytes())
        elif kind and self.sizes[key][0] != kind:
            self._keep(key, kind, self._forget(key))

    def _keep(self, key: int, kind: Kind, size: int) -> None:
        size = math.ceil(size / ROUNDED) * ROUNDED
        self.sizes[key] = kind, size
        self.now[kind] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def _forget(self, key: int) -> int:
        kind, size = self.sizes.pop(key, ("temporary", 0))
        self.now[kind] -= size
        return size

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again for the shares
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and not isinstance(value, DTensor):
                self._see(value.untyped_storage())
        self._count(function, args, kwargs or {}, out)
        return out

    def _count(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Add the FLOPs of an operation, or the bytes that it sends."""
        if formula := FORMULAS.get(function._overloadpacket):
            name = "attention" if "attention" in str(function) else "matmuls"
            self.flops[name] += formula(*args, **kwargs, out_val=out)
        elif function.namespace == "c10d":
            tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
            kind = (
                "reduce_scatter"
                if "reduce_scatter" in str(function)
                else "gather"
                if "gather" in str(function)
                else "reduce"
            )
            self.sent[kind] += max((value.nbytes for value in tensors), default=0)
            if kind == "reduce_scatter":
                self.see(tensors[:1], "gradients")

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """Also follow storages that FSDP2 empties and fills again, which is no operation: gathered weights."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            self._forget(storage._cdata)
            original(storage, size)
            self._keep(storage._cdata, "gathered", size)
            return storage

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]
