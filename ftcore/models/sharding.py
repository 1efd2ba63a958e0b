"""The model cut into shares, one for each process: FSDP2 (Zhao et al. 2023, arXiv:2304.11277) per transformer block.

A process holds its share of weights, gradients and optimizer state, and the full weights of a block only while that block
computes. From the first byte on: of the blocks' weights it reads its own rows from the files; what is around the blocks
(embeddings, last norm, head) and adapters it makes whole, as every process does, and then cuts. Where processes must not wait
for each other (rollouts, comparisons), each holds the full weights for a while.

With `hardware.replicas` the model is cut within groups of processes, and each group holds a copy (HSDP).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication

from ftcore.models.blocks import transformer_blocks
from ftcore.settings import Machine

# The processes of this run: copies, if there are several, times shares of each. peft knows weights in shares by the name "fsdp".
_mesh: DeviceMesh | None = None
_loading = False


def strategy(machine: Machine) -> ModelParallelStrategy:
    """Lightning's strategy for FSDP2 over all processes, also on CPUs."""
    return ModelParallelStrategy(machine.processes, tensor_parallel_size=1, process_group_backend=_backend(machine))


def _backend(machine: Machine) -> str:
    return "gloo" if machine.device == "cpu" else "nccl"


@contextlib.contextmanager
def in_shares(machine: Machine) -> Iterator[None]:
    """Inside, networks load in shares where the machine's strategy asks for it: the processes meet before the model loads."""
    global _mesh, _loading
    if machine.strategy != "fsdp":
        _mesh = None
        yield
        return
    if not dist.is_initialized():
        dist.init_process_group(_backend(machine))
    sizes = {"replicas": machine.replicas} if machine.replicas > 1 else {}
    sizes["fsdp"] = machine.processes // machine.replicas
    _mesh, _loading = init_device_mesh(machine.device, tuple(sizes.values()), mesh_dim_names=tuple(sizes)), True
    try:
        with implicit_replication():  # what is new beside them, as an adapter, is whole
            yield
    finally:
        _loading = False


def born_in_shares(auto_class: Any, options: Mapping[str, Any]) -> Any:
    """What `from_pretrained` is called on: where networks load in shares, a class that reads this process's rows of the blocks.

    `auto_class` is a transformers auto class, `options` are those of its `from_config`.
    """
    if not _loading:
        return auto_class
    with torch.device("meta"):
        network_class: Any = type(auto_class.from_config(**options))

    def build(self: Any, *args: object, **kwargs: object) -> None:
        network_class.__init__(self, *args, **kwargs)
        cut(self)

    return type(network_class.__name__, (network_class,), {"__init__": build, "__module__": network_class.__module__})


def cut(network: nn.Module) -> None:
    """Keep this process's rows of the blocks' weights, which are the same in every process. Nothing where networks stay whole."""
    if _mesh is not None and _loading:
        mesh = _mesh["fsdp"]
        for block in transformer_blocks(network):
            replace_parameters(block, lambda value: _distributed(value, mesh, [Shard(0)]))


def shard(networks: Iterable[nn.Module], device: torch.device, in_bfloat16: bool) -> None:
    """Have FSDP2 gather and free every transformer block, and what is around them; what is whole yet is cut.

    Does nothing in a run that is not in shares. `in_bfloat16`: gathered and computed in half the memory and traffic. Gradients
    are summed in float32 whatever the precision of the weights.
    """
    for network in networks if _mesh is not None else ():
        _shard(network, device, MixedPrecisionPolicy(torch.bfloat16 if in_bfloat16 else None, torch.float32))


def _shard(network: nn.Module, device: torch.device, policy: MixedPrecisionPolicy) -> None:
    values = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    replace_parameters(network, lambda value: torch.empty(value.shape, dtype=value.dtype, device="meta"))
    # Of a PeftModel, the network inside: `generate` of the outer one does not call the outer one's hooks.
    root = network.get_submodule("base_model.model") if hasattr(network, "disable_adapter") else network
    for module in (*transformer_blocks(root), root):
        fully_shard(module, mesh=_mesh, reshard_after_forward=True, mp_policy=policy)
    network.to_empty(device=device)
    with torch.no_grad():
        for name, own in (*network.named_parameters(), *network.named_buffers()):
            local(own).copy_(local(sharded_like(values.pop(name).detach(), own)))


def sharded_like(value: Tensor, own: Tensor) -> Tensor:
    """`value`, which is the same in every process, cut as `own` is."""
    if isinstance(value, DTensor) or not isinstance(own, DTensor):
        return value
    return _distributed(value, own.device_mesh, own.placements)


def _distributed(value: Tensor, mesh: DeviceMesh, placements: Iterable[Placement]) -> DTensor:
    """A tensor that every process has, of which each keeps its own rows, without sending any."""
    return distribute_tensor(value, mesh, list(placements), src_data_rank=None)


def local(value: Tensor) -> Tensor:
    """This process's rows of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def full_tensor(value: Tensor) -> Tensor:
    """A tensor put together from its shards. Every process must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextlib.contextmanager
def whole(module: Any) -> Iterator[None]:
    """Inside, a layer's weights are plain tensors in every process; then they are cut as before."""
    shards = {name: value for name, value in module.named_parameters() if isinstance(value, DTensor)}
    replace_parameters(module, full_tensor)
    yield
    values = {id(value): shards[name] for name, value in module.named_parameters() if name in shards}
    replace_parameters(module, lambda value: sharded_like(value, values[id(value)]) if id(value) in values else value)


@torch.no_grad()
def replace_parameters(module: nn.Module, by: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter by what `by` makes of it. Tied parameters stay tied."""
    done = dict[int, nn.Parameter]()
    for inner in module.modules():
        for name, own in inner._parameters.items():
            if own is not None:
                if id(own) not in done:
                    value = by(own)
                    done[id(own)] = own if value is own else nn.Parameter(value.detach(), own.requires_grad)
                inner._parameters[name] = done[id(own)]


@contextlib.contextmanager
def unsharded(networks: Iterable[nn.Module]) -> Iterator[None]:
    """The full weights in every process, so that none waits for another. Does nothing without shards."""
    modules = [module for network in networks for module in network.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)


def sum_over_copies(network: nn.Module, yes: bool) -> None:
    """Whether the next backward pass sums gradients over the copies of the model: only a step's last micro-batch needs to."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(yes, recurse=False)
