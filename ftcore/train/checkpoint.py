"""Checkpoints: whole or not there, checked when they are read, and enough to go on as if nothing had happened.

A checkpoint is a folder checkpoints/step-<k>: state.json, a safetensors file of each process, and manifest.json, written last,
with the size and checksum of each file. All of it is made in a hidden folder beside, flushed to the disk and renamed. It holds
the weights that train (a frozen base is loaded as it was), AdamW's moments, every process's random states and how far the run
had come; the order of rows and the schedule follow from that. Nothing is pickled.
"""

import errno
import json
import os
import random
import shutil
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftcore.errors import StorageError
from ftcore.machine.processes import gathered, rank_and_world
from ftcore.models.sharding import sharded_like

State = dict[str, Any]
# Name -> size in bytes and checksum.
Files = dict[str, list[int]]
MANIFEST, STATE = "manifest.json", "state.json"
# Damaged checkpoints are only of use when an older one is left.
FEWEST = 2


def folders(checkpoints: Path) -> list[Path]:
    """The checkpoints in a run's folder of them, newest first."""
    return sorted(checkpoints.glob("step-*"), reverse=True)


def newest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones after it are named. None without any."""
    for folder in folders(checkpoints):
        damage = problem(folder)
        if not damage:
            return folder
        print(f"{folder} is damaged ({damage}); looking at the one before.", file=sys.stderr)
    return None


def problem(folder: Path) -> str:
    """What is wrong with a checkpoint's files; "" for nothing."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        assert isinstance(files, dict) and STATE in files
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, AssertionError):
        return f"{MANIFEST} cannot be read"
    for name, (size, checksum) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
        if _checksum(file) != checksum:
            return f"{name} has changed"
    return _unreadable(folder)


def _unreadable(folder: Path) -> str:
    """Whether files that are as they were written were never a checkpoint's."""
    try:
        assert isinstance(read_state(folder), dict)
        for file in folder.glob("process-*.safetensors"):
            with safe_open(file, "pt"):
                pass
    except (ValueError, AssertionError, RecursionError, SafetensorError):
        return "its files cannot be read"
    return ""


def read_state(folder: Path) -> State:
    """What state.json says."""
    return json.loads((folder / STATE).read_text())


def write(checkpoints: Path, step: int, tensors: dict[str, Tensor], state: State, keep: int) -> None:
    """Write checkpoint `step` with this process's tensors and the first process's state, then remove the oldest beyond `keep`.

    Called in every process. Raises `StorageError` in all of them when one could not write; older checkpoints stay.
    """
    rank, _ = rank_and_world()
    target = checkpoints / f"step-{step:08d}"
    partial = target.with_name(f".{target.name}")
    gathered(_try(lambda: _begin(partial)) if rank == 0 else None)
    written = gathered(_try(lambda: write_mine(partial, rank, tensors, state)))
    failures = [error for _, error in written if error]
    files = {name: facts for mine, error in written if not error for name, facts in mine.items()}
    if rank == 0:
        failures = failures or [error for error in [_try(lambda: _finish(partial, target, files))[1]] if error]
        shutil.rmtree(partial, ignore_errors=True)
    if failures := [message for part in gathered(failures) for message in part]:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        free = shutil.disk_usage(checkpoints.parent).free
        raise StorageError(
            f"Checkpoint {target} was not written: {failures[0]}. A process needs {size:,} bytes, {free:,} are free; the "
            "checkpoints before it are as they were."
        )
    if rank == 0:
        for old in folders(checkpoints)[max(keep, FEWEST) :]:
            shutil.rmtree(old, ignore_errors=True)


def _try(work: Callable[[], Any]) -> tuple[Any, str]:
    """(what `work` returns, what went wrong)."""
    try:
        return work(), ""
    except OSError as error:
        return None, f"{error.strerror or error} ({error.filename})" if error.filename else str(error)


def _begin(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def write_mine(partial: Path, rank: int, tensors: dict[str, Tensor], state: State) -> Files:
    """Write this process's file, and the state that is the same for all; their sizes and checksums. Raises `OSError`."""
    name = f"process-{rank}.safetensors"
    _save(partial / name, tensors)
    files = {name: _flushed(partial / name)}
    if rank == 0:
        (partial / STATE).write_text(json.dumps(state))
        files[STATE] = _flushed(partial / STATE)
    return files


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors. Raises `OSError` like every other writing where safetensors has an error of its own."""
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        reason = str(error).rpartition("I/O error: ")[2].partition(" (os error")[0]
        raise OSError(errno.EIO, reason, str(file)) from None
    with suppress(OSError):  # a file system may know no permissions
        file.chmod(0o666 & file.parent.stat().st_mode)  # safetensors makes files for their owner alone


def _flushed(file: Path) -> list[int]:
    """Wait until a file is on the disk; its size and checksum, which are taken meanwhile from what the system still holds."""
    with ThreadPoolExecutor(1) as other:
        flush = other.submit(_flush, file)
        facts = [file.stat().st_size, _checksum(file)]
        flush.result()
    return facts


def _finish(partial: Path, target: Path, files: Files) -> None:
    """Write the manifest and give the folder its name."""
    (partial / MANIFEST).write_text(json.dumps(files))
    _flush(partial / MANIFEST)
    _flush(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(file: Path) -> int:
    """CRC-32: it finds what disks and crashes do, in a third of the time of SHA-256."""
    checksum = 0
    with file.open("rb", buffering=0) as content:
        while block := content.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def training_tensors(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained weights, what the optimizer keeps of them, and random states, as far as this process holds them.

    Of sharded ones each process has its part; of the others the first process has all.
    """
    rank, _ = rank_and_world()
    found = {f"weight/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        found |= {f"{key}/{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    sharded = {name: value.to_local() for name, value in found.items() if isinstance(value, DTensor)}
    whole = {name: value for name, value in found.items() if not isinstance(value, DTensor)} if rank == 0 else {}
    return {name: value.contiguous() for name, value in (sharded | whole).items()} | _random_states()


@torch.no_grad()
def load_tensors(folder: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights, optimizer state and random states where they were; parts are cut anew for other processes."""
    rank, _ = rank_and_world()
    numbers = range(len(list(folder.glob("process-*.safetensors"))))
    files = [safe_open(folder / f"process-{k}.safetensors", "pt") for k in numbers]
    names = [set(file.keys()) for file in files]

    def whole(name: str) -> Tensor:
        parts = [file.get_tensor(name) for file, own in zip(files, names, strict=True) if name in own]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    kinds = {name.partition("/")[0] for name in names[0]} - {"weight", "random"}
    for name, parameter in parameters.items():
        parameter.copy_(sharded_like(whole(f"weight/{name}"), parameter))
        if f"step/{name}" in names[0]:
            optimizer.state[parameter] = {
                kind: whole(f"{kind}/{name}") if kind == "step" else sharded_like(whole(f"{kind}/{name}"), parameter)
                for kind in sorted(kinds)
            }
    _set_random_states({name: files[rank % len(files)].get_tensor(name) for name in names[rank % len(files)]})


def _random_states() -> dict[str, Tensor]:
    numpy: Any = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*numpy[1].tolist(), numpy[2]]),
        "python": torch.tensor(random.getstate()[1]),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"random/{name}": state for name, state in states.items()}


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["random/torch"])
    *keys, position = states["random/numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, 0, 0.0))
    random.setstate((3, tuple(states["random/python"].tolist()), None))
    if torch.cuda.is_available() and "random/cuda" in states:
        torch.cuda.set_rng_state(states["random/cuda"])
