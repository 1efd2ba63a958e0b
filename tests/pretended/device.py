"""Tensors that say they are on cuda:0, and what is noted of them."""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
# How often something happened at each place: two devices met, the host would have waited, float64 got onto the device.
MIXED, WAITS, DOUBLES = Counter(), Counter(), Counter()
# Operations whose result the host reads, or whose shape depends on values.
READS = {aten._local_scalar_dense.default, aten.equal.default}
WAITING = READS | {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default}
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}
COPYING = {aten._to_copy.default, aten.copy_.default}
OURS, THEIRS = "/ftcore/", ("/transformers/", "/lightning/", "/peft/", "/torch/optim/", "/torch/nn/utils/")


class OnDevice(torch.Tensor):
    """A tensor on the pretended device; `inner` on the CPU has its values."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        shape = inner.shape, inner.stride(), inner.storage_offset()
        outer = torch.Tensor._make_wrapper_subclass(
            cls, *shape, dtype=inner.dtype, layout=inner.layout, device=torch.device("cuda:0")
        )
        outer.inner = inner
        if inner.dtype == torch.float64:
            DOUBLES[place()] += 1
        return outer

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnDevice(inner["inner"])

    def tolist(self):
        WAITS[f"{place()} tolist"] += 1
        return self.inner.detach().tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is on, what is made on CUDA is made on the pretended device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here = is_cuda(kwargs.get("device")) or any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs)))
        return dispatch(func, args, kwargs) if here else func(*args, **kwargs)


def is_cuda(device: object) -> bool:
    """Whether the argument `device` of an operation names the pretended device."""
    return device is not None and torch.device(device).type == "cuda"


def place() -> str:
    """The innermost line of ftcore, and the innermost one of a library that it called from there."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_stack(limit=60)]
    ours = max((k for k, (file, _) in enumerate(frames) if OURS in file), default=-1)
    theirs = max((k for k, (file, _) in enumerate(frames) if any(name in file for name in THEIRS)), default=-1)
    found = [frames[k] for k in (ours, theirs if theirs > ours else -1) if k >= 0]
    return " > ".join(f"{'/'.join(Path(file).parts[-2:])}:{line}" for file, line in found)


def dispatch(func, args, kwargs):
    """Compute on the CPU what was asked of the pretended device, and note what would be wrong or slow on a real one."""
    if (
        torch.is_inference_mode_enabled() and func._can_decompose()
    ):  # inference mode skips what autograd would decompose
        with Device():
            return func.decompose(*args, **kwargs)
    stays = stays_on_device(func, args, kwargs)
    note_mixed(func, args, kwargs)
    note_waits(func, args, kwargs, stays)
    device = {"device": torch.device("cpu")} if is_cuda(kwargs.get("device")) else {}
    pinned = {"pin_memory": False} if kwargs.get("pin_memory") else {}
    plain_args, plain_kwargs = tree_map_only(
        OnDevice, lambda outer: outer.inner, (args, {**kwargs, **device, **pinned})
    )
    out = func(*plain_args, **plain_kwargs)
    if func in READS or not stays:
        return out
    wrapped = tree_map_only(torch.Tensor, lambda one: one if isinstance(one, OnDevice) else OnDevice(one), out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def stays_on_device(func, args, kwargs) -> bool:
    """Whether the result is on the pretended device."""
    if func is aten.copy_.default:
        return isinstance(args[0], OnDevice)
    if (device := kwargs.get("device")) is not None:
        return is_cuda(device)
    return any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs)))


def note_mixed(func, args, kwargs) -> None:
    """Raise `RuntimeError`, as torch does, where tensors of two devices meet. Numbers and indices may be on the CPU."""
    if func in COPYING or "_foreach" in str(func):
        return
    checked = (args[0], args[2:]) if func in INDEXING else (args, kwargs)
    tensors = [leaf for leaf in tree_leaves(checked) if isinstance(leaf, torch.Tensor)]
    numbers = "_fused" in str(func)  # a fused kernel reads its step counter there
    on_device = [isinstance(one, OnDevice) for one in tensors if isinstance(one, OnDevice) or one.ndim or numbers]
    if any(on_device) and not all(on_device):
        MIXED[f"{place()} {func}"] += 1
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got cuda:0 and cpu.")


def note_waits(func, args, kwargs, stays: bool) -> None:
    """Note where the host waits for the device: it reads values, or it copies and may not go on before the copy is done."""
    source = args[1] if func is aten.copy_.default else args[0] if func is aten._to_copy.default else None
    if source is not None:
        across = isinstance(source, OnDevice) != stays
        non_blocking = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
        if across and not (stays and non_blocking):
            WAITS[f"{place()} copy {'to' if stays else 'from'} the device"] += 1
    on_device = any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs)))
    masks = func in INDEXING and any(one is not None and one.dtype == torch.bool for one in args[1])
    if on_device and (func in WAITING or masks):
        WAITS[f"{place()} {'index by a mask' if masks else func.overloadpacket.__name__}"] += 1


@contextmanager
def pretended() -> Iterator[None]:
    """Have a pretended CUDA device inside."""
    only_cpu = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # so that `torch.tensor(..., device="cuda")` is seen here
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with Device():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(only_cpu)
