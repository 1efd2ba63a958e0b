"""Tensors of all processes in a folder of safetensors files, by torch's distributed checkpoints.

Every process writes its own shards, and of what all processes hold alike only one writes a copy. Each reads its own slices, also
on another number of processes. Nothing is pickled: torch's usual writer would, its safetensors writer does not.
"""

import errno
import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ftcore.machine.processes import gathered, rank_and_world


def write(folder: Path, tensors: dict[str, Tensor]) -> list[Path]:
    """Write tensors and shards by name; the files that are this process's. Every process must call this.

    Raises `OSError` in all of them when one of them could not write.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError):
            raise OSError(
                cause.errno or errno.EIO, cause.strerror or str(cause), cause.filename or str(folder)
            ) from None
        raise
    return sorted(folder.glob(f"shard-{rank_and_world()[0] + 1:05d}-*.safetensors"))


def write_whole(folder: Path, tensors: dict[str, Tensor]) -> None:
    """`write`, with the folder complete or not there. Every process must call this."""
    partial, first = folder.with_name(f".{folder.name}"), rank_and_world()[0] == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    gathered(None)  # now nothing is left of an earlier try
    write(partial, tensors)
    gathered(None)  # now all have written
    if first:
        shutil.rmtree(folder, ignore_errors=True)  # of the same step, before the run went on
        partial.rename(folder)
    gathered(None)


def read(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill tensors and shards by name, in place."""
    dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())


def names(folder: Path) -> set[str]:
    """The names of all tensors in a folder. Raises `SafetensorError` for a file that is none."""
    found = set[str]()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found
