"""Starts the processes of a run: in this one when one is enough, else by torch's elastic launcher.

Lightning finds the environment that the launcher set and starts nothing itself, so command lines are never replayed.
"""

import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from ftcore.config.secrets import without_secrets
from ftcore.console import stderr, steady_streams
from ftcore.data.records import Records
from ftcore.errors import FtcoreError, HardwareError, OutOfMemory, Stopped, paragraph, storage_errors, traced
from ftcore.machine import torchrun
from ftcore.machine.hardware import free_memory, smaller
from ftcore.machine.isolated import heeded
from ftcore.run_folder import Run
from ftcore.settings import Config, Hardware, Resolved

# Seconds that a process which has lost another waits to be ended, so that the launcher first sees the one that went wrong.
GRACE = 10
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
# Exit code by which a process tells the one that started it that a device's memory is full (ENOMEM): it may try again.
OUT_OF_MEMORY = 12


def launch(config: Config, resolved: Resolved, run: Run, records: Records | None = None) -> None:
    """Run `ftcore.train.run.run` in the machine's processes. The first failure is raised as its own error kind.

    `records` that are read already serve when this process is the only one. Where a device's memory is full, the run goes on with
    the next smaller micro-batch size, then with activation checkpointing, as far as these are ours to choose.
    """
    while True:
        try:
            return _launch(config, resolved, run, records)
        except OutOfMemory as error:
            less = None
            if config["micro_batch_size"] == "auto":
                less = smaller(config["global_batch_size"], resolved.micro_batch_size, resolved.machine.processes)
            if less:
                resolved, chosen = replace(resolved, micro_batch_size=less), f"micro_batch_size={less}"
            elif config["hardware"]["activation_checkpointing"] == "auto":
                config = {**config, "hardware": {**config["hardware"], "activation_checkpointing": True}}
                chosen = "hardware.activation_checkpointing=true"
            else:
                raise
            stderr.print(f"{error} Going on with {chosen}.")
        free_memory()  # of the failed run, which the error's traceback held until here


def _launch(config: Config, resolved: Resolved, run: Run, records: Records | None) -> None:
    import ftcore.runs.preload  # noqa: F401 (first, since it imports faster than its parts)
    from ftcore.train.checkpoint import newest
    from ftcore.train.run import run as train

    start, devices = newest(run.checkpoints), resolved.machine.devices
    if torchrun.started() or devices == 1:
        store = torchrun.send((config, resolved, run.folder, start)) if torchrun.started() else None
        train(config, resolved, run, records, start)
        del store  # kept until the others have ended
        return
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=run.folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in heeded(PASSED_ON)),
    )
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // devices, 1)))
    try:
        elastic_launch(settings, run_rank)(config, resolved, run.folder, start, True)
    except SignalException as received:
        sys.exit(128 + received.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise _first_error(f"Process {rank} of {devices}", failure.exitcode) from None


def _first_error(process: str, exit_code: int) -> FtcoreError:
    """The error of a process, which has printed its own message, by its exit code."""
    kinds = {kind.exit_code: kind for kind in FtcoreError.__subclasses__()}
    kinds |= {FtcoreError.exit_code: FtcoreError, OUT_OF_MEMORY: OutOfMemory}
    message = f"{process}: its message stands above."
    if exit_code > 128:
        return Stopped(exit_code, message)
    if exit_code in kinds:
        return kinds[exit_code](message)
    return HardwareError(f"{process} ended with exit code {exit_code}.")


def check_processes(hardware: Hardware) -> None:
    """Refuse a number of processes that is not there, before anything is read. Raises `HardwareError`."""
    devices, nodes = hardware["devices"], hardware["num_nodes"]
    if torchrun.started():
        if (started := int(os.environ["WORLD_SIZE"])) != devices * nodes:
            product = f"hardware.devices x hardware.num_nodes = {devices} x {nodes} = {devices * nodes}"
            raise HardwareError(f"{started} processes were started, and {product}.")
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise HardwareError("Run ftcore in one SLURM task, since it starts its processes, or as hardware=slurm.")
    elif nodes > 1 and not hardware["slurm"]:
        raise HardwareError(
            "A run on several machines is started on each of them by torchrun:\n"
            f"  torchrun --nnodes={nodes} --nproc-per-node={devices} --rdzv-backend=c10d "
            "--rdzv-endpoint=<first machine>:29500 -m ftcore ...\nor by SLURM: hardware=slurm."
        )


def run_rank(config: Config, resolved: Resolved, folder: Path, start: Path | None, ours: bool) -> None:
    """One process of several; prints its own error, because only its exit code reaches the launcher, which may be `ours`."""
    from torch.distributed import DistError

    import ftcore.runs.preload  # noqa: F401
    from ftcore.train.run import run

    steady_streams()
    try:
        with storage_errors():
            run(config, resolved, Run(folder), start=start)
    except FtcoreError as error:
        stderr.print(without_secrets(paragraph(error, f" (process {os.environ['RANK']})")))
        sys.exit(OUT_OF_MEMORY if ours and isinstance(error, OutOfMemory) else error.exit_code)
    except Exception as error:  # a fault of ours: nobody else would show it
        lost = isinstance(error, DistError) or "gloo" in str(error)  # what went wrong is in another process
        shown = str(error).split(". ")[0] if lost else traced(error)
        stderr.print(f"Process {os.environ['RANK']}: {shown}")
        time.sleep(GRACE if lost and ours else 0)
        sys.exit(1)
