"""What a run on GPUs begins with where the user leaves it to us: the numbers of `ftcore plan`, made in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import TypedDict, cast

from ftcore.console import stderr
from ftcore.errors import HardwareError
from ftcore.run_folder import Run
from ftcore.settings import Config, Resolved

# Seconds that a plan may take; a run that cannot be planned begins without.
LONGEST = 300
# By which a process of torchrun or SLURM knows its place. A plan is made by one process, and is not it.
OF_A_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
)


class Planned(TypedDict):
    """What is read of the answer of `plan`."""

    peak_gb: float
    micro_batch_size: int
    activation_checkpointing: bool


def with_plan(config: Config, resolved: Resolved, run: Run) -> tuple[Config, Resolved]:
    """The config and what it comes to, with planned micro-batch size and checkpointing for those that are `auto` on a GPU.

    They change no result. A device that is full all the same is met by `launch`, which goes on with less.
    """
    hardware = config["hardware"]
    if resolved.machine.accelerator != "gpu" or "auto" not in (
        config["micro_batch_size"],
        hardware["activation_checkpointing"],
    ):
        return config, resolved
    if not (plan := _plan_of(run)):
        return config, resolved
    resolved = replace(resolved, planned_gb=plan["peak_gb"])
    if config["micro_batch_size"] == "auto":
        resolved = replace(resolved, micro_batch_size=plan["micro_batch_size"])
    if hardware["activation_checkpointing"] == "auto" and plan["activation_checkpointing"]:
        config = {**config, "hardware": {**hardware, "activation_checkpointing": True}}
    chosen = f"micro_batch_size={resolved.micro_batch_size}" + ", checkpointing" * plan["activation_checkpointing"]
    stderr.print(f"Planned: {plan['peak_gb']:.1f} GB on each device with {chosen}.")
    return config, resolved


def _plan_of(run: Run) -> Planned | None:
    """The answer of `plan run=<folder>`; None when there is none."""
    command = [sys.executable, "-P", "-m", "ftcore", "plan", f"run={run.folder}", "json=true"]
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LONGEST, check=False)
        return cast(Planned, json.loads(done.stdout)) if done.returncode in (0, HardwareError.exit_code) else None
    except (subprocess.TimeoutExpired, ValueError):
        return None
