"""The model in shares, one for each process: FSDP2 (Zhao et al. 2023, arXiv:2304.11277) per transformer block.

A process holds its share of weights, gradients and optimizer state, and has a block whole only while that block computes. The
first process reads the weights and deals them out; the others build the network without storage. Where processes must not
wait for each other (rollouts, comparisons) all have all of it for a while.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ftcore.machine.processes import rank_and_world
from ftcore.models.blocks import transformer_blocks
from ftcore.settings import Machine


def strategy(machine: Machine) -> ModelParallelStrategy:
    """Lightning's strategy for FSDP2 over all processes, also on CPUs."""
    return ModelParallelStrategy(
        data_parallel_size=machine.processes,
        tensor_parallel_size=1,
        process_group_backend="gloo" if machine.accelerator == "cpu" else None,
    )


def without_storage(machine: Machine) -> contextlib.AbstractContextManager[object]:
    """The context to build a network in: on the meta device where another process will deal out the weights."""
    first = os.environ.get("RANK", "0") == "0"
    return contextlib.nullcontext() if first or machine.strategy != "fsdp" else torch.device("meta")


def shard(network: Any, mesh: Any, device: torch.device, precision: str) -> None:
    """Cut every transformer block, and what is around them, into a share for each process of `mesh`.

    The values are those of the first process. Gradients are averaged in float32 whatever the precision of the weights.
    """
    first = rank_and_world()[0] == 0
    whole = {**dict(network.named_parameters()), **dict(network.named_buffers())} if first else {}
    # Of a PeftModel, the network inside: `generate` of the outer one would pass by its hooks.
    root = network.base_model.model if hasattr(network, "disable_adapter") else network
    gathered_in = torch.bfloat16 if precision == "bf16-mixed" else None  # half of what is sent and held
    policy = MixedPrecisionPolicy(param_dtype=gathered_in, reduce_dtype=torch.float32)
    for module in (*transformer_blocks(root), root):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    network.to_empty(device=device)
    with torch.no_grad():
        for name, own in (*network.named_parameters(), *network.named_buffers()):
            value = whole[name].to(device) if first else torch.empty(own.shape, dtype=own.dtype, device=device)
            if not isinstance(own, DTensor):
                dist.broadcast(value, 0)
            own.copy_(like(value, own))


def like(value: Tensor, own: Tensor) -> Tensor:
    """`value` where, and in the share in which, `own` is: shares are cut from the first process's value."""
    value = value.to(own.device)
    return distribute_tensor(value, own.device_mesh, own.placements) if isinstance(own, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """A tensor put together from its shares. Called in every process."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextlib.contextmanager
def unsharded(networks: list[Any]) -> Iterator[None]:
    """All weights in every process, so that each can work at its own pace. Without shares nothing happens."""
    parts = [module for network in networks for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def sync_gradients(network: Any, yes: bool) -> None:
    """Whether the next backward pass adds up the gradients of all processes: only the last micro-batch's of a step need to."""
    for part in network.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(yes, recurse=False)


def assemble(network: Any) -> None:
    """Put whole parameters back, in the first process on the CPU, to be saved. Nothing can be computed after it."""
    first, done = rank_and_world()[0] == 0, dict[int, torch.nn.Parameter]()
    for module in network.modules():
        for name, own in module._parameters.items():
            if isinstance(own, DTensor):
                if id(own) not in done:  # tied ones stay tied
                    full = whole(own.data)
                    done[id(own)] = torch.nn.Parameter(full.cpu() if first else full[:0], own.requires_grad)
                module._parameters[name] = done[id(own)]
