"""Checkpoints: complete or not there, checked when they are read, and enough to resume as if nothing had happened.

A checkpoint is a folder checkpoints/step-<k>: state.json, safetensors files of the processes, and manifest.json with the size and
checksum of each file, written last. All of it is written to a hidden folder, flushed to the disk and then renamed. It holds the
weights that train (a frozen base is loaded again), AdamW's moments, every process's random states and the progress of the run;
the order of rows and the schedule follow from that. Nothing is pickled.
"""

import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ftcore.console import stderr
from ftcore.errors import StorageError
from ftcore.machine.processes import gathered, rank_and_world
from ftcore.models.sharding import local
from ftcore.train import tensors

State = dict[str, Any]
Files = dict[str, list[int]]  # name -> size in bytes, checksum
NAME = re.compile(r"step-\d{8,}")
MANIFEST, STATE = "manifest.json", "state.json"
# Should the newest one be damaged, an older one must be left.
FEWEST = 2


def folders(checkpoints: Path) -> list[Path]:
    """The checkpoints in a run's folder for them, newest first. What has another name is not ours."""
    return sorted((path for path in checkpoints.glob("step-*") if NAME.fullmatch(path.name)), reverse=True)


def newest(checkpoints: Path) -> Path | None:
    """The newest intact checkpoint of a run, None without any. Prints which newer ones are damaged."""
    for folder in folders(checkpoints):
        damage = problem(folder)
        if not damage:
            return folder
        stderr.print(f"{folder} is damaged ({damage}); trying the one before.")
    return None


def problem(folder: Path) -> str:
    """What is wrong with a checkpoint's files, or "". Files may also be undamaged and still not those of a checkpoint."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        assert isinstance(files, dict) and STATE in files
        for name, (size, checksum) in files.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            if _checksum(folder / name) != checksum:
                return f"{name} has changed"
        assert isinstance(read_state(folder), dict)
        assert tensors.names(folder)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, TypeError, AssertionError, RecursionError, SafetensorError):
        return "its files cannot be read"
    return ""


def read_state(folder: Path) -> State:
    """The content of state.json."""
    return json.loads((folder / STATE).read_text())


def write(checkpoints: Path, step: int, values: dict[str, Tensor], state: State, keep: int) -> None:
    """Write checkpoint `step` with this process's tensors and the first process's state, then remove the oldest beyond `keep`.

    Called in every process. Raises `StorageError` in all of them when one of them could not write; older checkpoints stay.
    """
    target = checkpoints / f"step-{step:08d}"
    if errors := _write(target, values, state):
        size, free = sum(local(value).nbytes for value in values.values()), shutil.disk_usage(checkpoints.parent).free
        raise StorageError(
            f"Checkpoint {target} was not written: {errors[0]}. A process needs {size:,} bytes, {free:,} are free. Older "
            "checkpoints are still there."
        )
    if rank_and_world()[0] == 0:
        for old in folders(checkpoints)[max(keep, FEWEST) :]:
            shutil.rmtree(old, ignore_errors=True)


def _write(target: Path, values: dict[str, Tensor], state: State) -> list[str]:
    """Write all files beside `target`, then rename. Returns, in every process, what went wrong in any of them."""
    rank, _ = rank_and_world()
    partial, own, errors = target.with_name(f".{target.name}"), Files(), list[str]()
    with _noted(errors):
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    gathered(None)  # now the folder is there
    with _noted(errors):
        own = write_own(partial, rank, values, state)
    parts = gathered((own, errors))
    errors = [error for _, part in parts for error in part]
    if rank == 0:
        with _noted(errors):
            if not errors:
                _finish(partial, target, {name: entry for files, _ in parts for name, entry in files.items()})
        shutil.rmtree(partial, ignore_errors=True)
    return gathered(errors)[0]


@contextmanager
def _noted(errors: list[str]) -> Iterator[None]:
    """Append the message of an `OSError` to `errors` instead of raising it: the other processes must learn of it."""
    try:
        yield
    except OSError as error:
        errors.append(f"{error.strerror or error} ({error.filename})" if error.filename else str(error))


def write_own(partial: Path, rank: int, values: dict[str, Tensor], state: State) -> Files:
    """Write this process's tensors, and in the first process the state. Raises `OSError`."""
    files = tensors.write(partial, values)
    for file in files:
        with suppress(OSError):  # some file systems have no permissions
            file.chmod(0o666 & partial.stat().st_mode)
    if rank == 0:
        (partial / STATE).write_text(json.dumps(state))
        files.append(partial / STATE)
    return {file.name: _flushed(file) for file in files}


def _flushed(file: Path) -> list[int]:
    """Wait until a file is on the disk; its size and checksum, which is taken meanwhile, while the file is in memory."""
    with ThreadPoolExecutor(1) as thread:
        flush = thread.submit(_flush, file)
        entry = [file.stat().st_size, _checksum(file)]
        flush.result()
    return entry


def _finish(partial: Path, target: Path, files: Files) -> None:
    """Write the manifest and give the folder its name."""
    (partial / MANIFEST).write_text(json.dumps(files))
    _flush(partial / MANIFEST)
    _flush(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Wait until the content of a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(file: Path) -> int:
    """CRC-32: it finds damage by disks and crashes, in a third of the time of SHA-256."""
    checksum = 0
    with file.open("rb", buffering=0) as content:
        while block := content.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def training_tensors(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The trained weights and their optimizer state, the same in every process or its shards; and its random states."""
    found = {f"weight/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        found |= {f"{key}/{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return found | _random_states(rank_and_world()[0])


@torch.no_grad()
def load_tensors(folder: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Restore weights, optimizer state and random states from a checkpoint, also one of another number of processes."""
    saved = tensors.names(folder)
    kinds = sorted({name.partition("/")[0] for name in saved} - {"weight", "random", "step"})
    into = {f"weight/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        if f"step/{name}" in saved:
            # Where AdamW reads its step counter.
            steps = torch.zeros((), device=parameter.device if optimizer.defaults["fused"] else "cpu")
            optimizer.state[parameter] = {"step": steps, **{kind: torch.zeros_like(parameter) for kind in kinds}}
            into |= {f"{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    count = len({name.split("/")[1] for name in saved if name.startswith("random/")})
    own = {name: value for name, value in _random_states(rank_and_world()[0] % count).items() if name in saved}
    tensors.read(folder, {**into, **own})
    _set_random_states({name.rpartition("/")[2]: value for name, value in own.items()})


def _random_states(process: int) -> dict[str, Tensor]:
    """Those of this process, named as those of number `process`."""
    numpy: Any = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*numpy[1].tolist(), numpy[2]]),
        "python": torch.tensor(random.getstate()[1]),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"random/{process}/{name}": state for name, state in states.items()}


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    *keys, position = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, 0, 0.0))
    random.setstate((3, tuple(states["python"].tolist()), None))
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
