"""Runs on a SLURM cluster, through submitit: all is checked here, then SLURM runs it, and again after an interruption.

A job works in a run folder that is there already, so what is submitted is `resume=<folder>`. When SLURM is about to end it,
submitit asks for a checkpoint: the run saves one between two steps and ends, and the job is put into the queue again.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ftcore.console import plain, typed
from ftcore.errors import HardwareError
from ftcore.settings import Config

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

# Keys of hardware.slurm by their names in submitit.
SUBMITIT = {name: name for name in ("timeout_min", "cpus_per_task", "mem_gb")}
SUBMITIT |= {"partition": "slurm_partition", "account": "slurm_account", "additional": "slurm_additional_parameters"}


def submit(config: Config, folder: Path) -> None:
    """Hand the run in `folder` to SLURM. Raises `HardwareError` when that cannot be done."""
    hardware = config["hardware"]
    ask = hardware["slurm"]
    assert ask
    several = hardware["num_nodes"] > 1  # else the one process on the machine starts the others
    try:
        from submitit import AutoExecutor

        executor = AutoExecutor(folder / "slurm", ask["cluster"], slurm_max_num_timeout=ask["max_requeues"])
        executor.update_parameters(
            name=config["name"],
            nodes=hardware["num_nodes"],
            tasks_per_node=hardware["devices"] if several else 1,
            gpus_per_node=0 if hardware["accelerator"] == "cpu" else hardware["devices"],
            **{SUBMITIT[key]: value for key, value in ask.items() if value and key in SUBMITIT},
        )
        job = executor.submit(Job(folder, several, config["trust"] or []))
    except ImportError:
        raise HardwareError("hardware.slurm needs submitit: pip install 'ftcore[slurm]'.") from None
    except (RuntimeError, OSError, ValueError, NameError) as error:  # submitit's own for a refused or missing sbatch
        raise HardwareError(f"SLURM did not take the job: {str(error).strip().splitlines()[-1]}") from None
    plain.print(f"Submitted as job {job.job_id}. Everything comes into {folder}")
    plain.print(f"Follow it with: {typed('tail', '-F', job.paths.stdout)}")


@dataclass
class Job:
    """One process of a job: the command that goes on with the run in `folder`."""

    folder: Path
    several: bool
    trust: list[str]
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __call__(self) -> None:
        """Run it to its end, with its exit code."""
        command = [sys.executable, "-m", "ftcore", f"resume={self.folder}", "hardware.slurm=null"]
        command += [f"trust=[{','.join(self.trust)}]"] if self.trust else []
        self.process = subprocess.Popen(command, env=self._environment())
        while (code := self.process.poll()) is None:
            time.sleep(0.2)
        if code:
            sys.exit(code)

    def _environment(self) -> dict[str, str]:
        if not self.several:
            return {key: value for key, value in os.environ.items() if key not in ("SLURM_NTASKS", "SLURM_PROCID")}
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        return {**os.environ, "TORCHELASTIC_RUN_ID": JobEnvironment().job_id}

    def checkpoint(self) -> "DelayedSubmission":
        """Called by submitit before the job is ended: save, then begin again from there."""
        from submitit.helpers import DelayedSubmission

        assert self.process
        self.process.send_signal(signal.SIGTERM)
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # `poll` above may be holding the process's lock
        return DelayedSubmission(Job(self.folder, self.several, self.trust))
