"""The model cut into shards, one for each process: FSDP2 (Zhao et al. 2023, arXiv:2304.11277) per transformer block.

A process holds its shard of weights, gradients and optimizer state, and the full weights of a block only while that block
computes. The first process reads the weights and deals out the shards; the others build the network on the meta device. Where
processes must not wait for each other (rollouts, comparisons), each holds the full weights for a while.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ftcore.machine.processes import rank_and_world
from ftcore.models.blocks import transformer_blocks
from ftcore.settings import Machine


def strategy(machine: Machine) -> ModelParallelStrategy:
    """Lightning's strategy for FSDP2 over all processes, also on CPUs."""
    backend = "gloo" if machine.accelerator == "cpu" else None
    return ModelParallelStrategy(machine.processes, tensor_parallel_size=1, process_group_backend=backend)


def without_storage(machine: Machine) -> contextlib.AbstractContextManager[object]:
    """The context to build a network in: the meta device if another process will deal out the weights."""
    first = os.environ.get("RANK", "0") == "0"
    return contextlib.nullcontext() if first or machine.strategy != "fsdp" else torch.device("meta")


def shard(network: nn.Module, mesh: DeviceMesh, device: torch.device, precision: str) -> None:
    """Cut every transformer block, and what is around them, into a shard for each process of `mesh`.

    The values are those of the first process. Gradients are averaged in float32 whatever the precision of the weights.
    """
    first = rank_and_world()[0] == 0
    values = {**dict(network.named_parameters()), **dict(network.named_buffers())} if first else {}
    # Of a PeftModel, the network inside: `generate` of the outer one does not call the outer one's hooks.
    root = network.get_submodule("base_model.model") if hasattr(network, "disable_adapter") else network
    gathered_in = torch.bfloat16 if precision == "bf16-mixed" else None  # half the memory and traffic
    policy = MixedPrecisionPolicy(param_dtype=gathered_in, reduce_dtype=torch.float32)
    for module in (*transformer_blocks(root), root):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    network.to_empty(device=device)
    with torch.no_grad():
        for name, own in (*network.named_parameters(), *network.named_buffers()):
            value = values[name].to(device) if first else torch.empty(own.shape, dtype=own.dtype, device=device)
            if not isinstance(own, DTensor):
                dist.broadcast(value, 0)
            own.copy_(sharded_like(value, own))


def sharded_like(value: Tensor, own: Tensor) -> Tensor:
    """`value` on the device of `own`, and sharded as `own` is; shards are cut from the first process's value."""
    value = value.to(own.device)
    return distribute_tensor(value, own.device_mesh, own.placements) if isinstance(own, DTensor) else value


def full_tensor(value: Tensor) -> Tensor:
    """A tensor put together from its shards. Every process must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


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


def sync_gradients(network: nn.Module, yes: bool) -> None:
    """Whether the next backward pass sums gradients over the processes: only a step's last micro-batch needs to."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(yes, recurse=False)


def assemble(network: nn.Module) -> None:
    """Put full parameters back to be saved, on the CPU of the first process. Nothing can be computed after it."""
    first, done = rank_and_world()[0] == 0, dict[int, nn.Parameter]()
    for module in network.modules():
        for name, own in module._parameters.items():
            if isinstance(own, DTensor):
                if id(own) not in done:  # tied parameters stay tied
                    full = full_tensor(own.data)
                    done[id(own)] = nn.Parameter(full.cpu() if first else full.new_empty(0), own.requires_grad)
                module._parameters[name] = done[id(own)]
