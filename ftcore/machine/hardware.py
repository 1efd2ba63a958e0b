"""The machine: what the hardware group asks for against what is there, and the Trainer keys that follow.

Everything here comes before a model is loaded, and nothing imports torch on a machine without CUDA devices.
"""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from ftcore.errors import ConfigError, HardwareError
from ftcore.settings import Accelerator, Machine, Precision, Role, Slurm, Strategy

# Rows that fill the arithmetic units of any machine; more only costs memory. A CPU is full with fewer tokens than that often is.
AUTO_ROWS = 16
CPU_TOKENS = 1536
# Flags of x86 processors that multiply bf16 numbers.
MULTIPLY_BF16 = {"amx_bf16", "avx512_bf16"}


def cuda_devices() -> int:
    """Number of CUDA devices; 0 without importing torch where the machine has no such device file."""
    if not any(next(Path("/dev").glob(name), None) for name in ("nvidia[0-9]*", "dxg", "kfd")):
        return 0
    import torch

    return torch.cuda.device_count()


def cpu_fact(name: str) -> str:
    """What Linux says of the first processor under `name`, such as "model name"; "" where it says nothing."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def memory_gb() -> float:
    """Memory of this machine, or what a container may have of it, 10^9 bytes."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # no control group, or no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits) / 1e9


def multiplies_bf16(accelerator: Literal["cpu", "gpu"]) -> bool:
    """Whether the device has units that multiply bf16 numbers. GPUs that SLURM has yet to find are taken to have them."""
    if accelerator == "cpu":
        return not MULTIPLY_BF16.isdisjoint(cpu_fact("flags").split())
    if not cuda_devices():
        return True
    import torch

    return torch.cuda.get_device_capability() >= (8, 0)


def find_machine(
    elsewhere: bool = False,
    /,
    *,
    accelerator: Accelerator,
    devices: Annotated[int, Ge(1)],
    num_nodes: Annotated[int, Ge(1)],
    strategy: Strategy,
    replicas: Annotated[int, Ge(1)],
    precision: Annotated[Precision | Literal["auto"] | None, Role("result")],
    activation_checkpointing: bool | Literal["auto"],
    compile: bool,
    slurm: Slurm | None,
) -> Machine:
    """The devices that are there for what is asked; `activation_checkpointing` and `compile` are the network's own.

    Raises `HardwareError` when the machine lacks what is asked for, unless it is `elsewhere` or SLURM is to find one.
    """
    found = cuda_devices()
    if accelerator == "auto":
        accelerator = "gpu" if found else "cpu"
    if accelerator == "gpu" and found < devices and not (elsewhere or slurm):
        nearest = "hardware=gpu" if found else "hardware=cpu, or hardware=ddp_2cpu to rehearse several processes"
        raise HardwareError(
            f"The hardware option needs {devices} CUDA device{'s' * (devices > 1)} per machine and this one has {found}. "
            f"The nearest option that runs here: {nearest}."
        )
    if strategy == "single" and devices * num_nodes > 1:
        raise ConfigError(f"hardware.devices={devices} and num_nodes={num_nodes} need hardware.strategy=ddp or fsdp.")
    if strategy == "fsdp" and devices * num_nodes == 1:
        raise ConfigError("hardware.strategy=fsdp needs several processes: set hardware.devices, or strategy=single.")
    if replicas > 1 and (strategy != "fsdp" or (devices * num_nodes) % replicas or devices * num_nodes == replicas):
        raise ConfigError(
            f"hardware.replicas={replicas} copies of a model need strategy=fsdp and the same number of processes each, at "
            f"least two: hardware.devices x hardware.num_nodes = {devices * num_nodes}, strategy={strategy}."
        )
    if precision == "auto" or (precision is None and accelerator == "gpu"):
        precision = "bf16-true" if multiplies_bf16(accelerator) else "32-true"
    if strategy == "fsdp" and precision == "16-mixed":
        raise ConfigError("hardware.precision=16-mixed does not go with strategy=fsdp: use bf16-mixed.")
    if precision == "16-mixed" and accelerator == "cpu":
        raise HardwareError("hardware.precision=16-mixed needs a GPU. On a CPU use 32-true (exact) or bf16-mixed.")
    return Machine(accelerator, devices, num_nodes, strategy, precision or "32-true", replicas)


def use_own_device(machine: Machine) -> None:
    """Make this process's GPU the current one: 4-bit weights are loaded to it at once, and objects are sent through it."""
    if machine.accelerator == "gpu":
        import torch

        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def keep_freed_memory() -> None:
    """Have the C library keep freed memory instead of giving it back (man mallopt; without glibc nothing happens).

    On a CPU, fresh pages for every large tensor cost more time than many an operation on it. Holes in what is kept are not all
    used again: who sets MALLOC_MMAP_THRESHOLD_ (man mallopt) has chosen otherwise.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    mmap_threshold, trim_threshold, top_pad = (-3, 2**30), (-1, 2**31 - 1), (-2, 2**26)  # option and value
    with suppress(AttributeError, OSError):
        for option in (mmap_threshold, trim_threshold, top_pad):
            ctypes.CDLL(None).mallopt(*option)


def free_memory() -> None:
    """Give the memory of what nothing refers to any more back to the devices."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # nothing happens where CUDA was not used


@contextmanager
def memory_of(key: str, value: object) -> Iterator[None]:
    """Say which setting fills a device's memory. Raises `HardwareError`."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise HardwareError(f"A device's memory is full. Lower {key} (now {value}); it changes no result.") from None


def micro_batch(
    global_batch_size: int, micro_batch_size: int | Literal["auto"], processes: int, most: int = AUTO_ROWS
) -> int:
    """Rows per forward pass and process; `auto` takes a process's whole share of a step, up to `most` rows.

    Raises `ConfigError` with the arithmetic when the rows of a step cannot be dealt out evenly.
    """
    fitting = [n for n in range(1, global_batch_size + 1) if global_batch_size % (n * processes) == 0]
    if micro_batch_size == "auto" and fitting:
        return max(n for n in fitting if n <= max(most, 1))
    if micro_batch_size in fitting:
        return int(micro_batch_size)
    rows = (1 if micro_batch_size == "auto" else micro_batch_size) * processes
    below, above = global_batch_size // rows * rows, (global_batch_size // rows + 1) * rows
    raise ConfigError(
        f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size x processes = {rows // processes} x "
        f"{processes} = {rows}. Nearest global_batch_size: {' or '.join(str(n) for n in (below, above) if n)}"
        + (f"; micro_batch_size that fits {global_batch_size}: {', '.join(map(str, fitting))}." if fitting else ".")
    )


def smaller(global_batch_size: int, micro_batch_size: int, processes: int) -> int | None:
    """The next micro-batch size below this one that keeps the rows of a step; None when there is none.

    >>> smaller(global_batch_size=24, micro_batch_size=6, processes=2)
    4
    """
    fitting = [n for n in range(1, micro_batch_size) if global_batch_size % (n * processes) == 0]
    return max(fitting, default=None)
