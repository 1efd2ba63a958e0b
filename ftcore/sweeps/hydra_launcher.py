"""Jobs of a sweep by a launcher plugin of Hydra (joblib, submitit, ray), when the command line names one.

Such a launcher composes each job from Hydra's own config. So it gets a config of two keys, the file that lists the jobs'
commands and the number of one of them, and the command itself composes as always.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra

from ftcore.errors import ConfigError
from ftcore.sweeps.job import ONE_JOB, Job, reason

FILE = "jobs.json"


def run_with_hydra(launcher: list[str], jobs: list[Job], folder: Path) -> dict[int, str]:
    """Run the jobs that are not finished with the launcher that `launcher` names and sets up; number -> reason of the failed.

    Raises `ConfigError` when Hydra does not know the launcher.
    """
    pending = {job.number: job for job in jobs if not job.finished}
    if not pending:
        return {}
    for job in pending.values():
        job.folder.mkdir(parents=True, exist_ok=True)
    listed = {number: {"words": job.words, "folder": str(job.folder)} for number, job in pending.items()}
    (folder / FILE).write_text(json.dumps(listed))
    words = [f"+jobs='{folder / FILE}'", f"+job={','.join(map(str, pending))}", *launcher]
    quiet = ["hydra/hydra_logging=none", "hydra/job_logging=none", "hydra.output_subdir=null"]
    place = f"hydra.sweep.dir='{folder / 'hydra'}'"
    command = [sys.executable, "-m", "ftcore.sweeps.hydra_launcher", "-m", *words, *quiet, place]
    with subprocess.Popen(command, process_group=0) as launching:
        try:
            launching.wait()
        except BaseException:  # Ctrl-C, SIGTERM: the jobs save and end
            os.killpg(launching.pid, signal.SIGTERM)
            raise
    if launching.returncode and not any(job.log.exists() for job in pending.values()):
        raise ConfigError(
            f"Hydra could not run {' '.join(launcher)}; install its plugin, such as hydra-joblib-launcher."
        )
    return {number: why for number, job in pending.items() if (why := reason(job, 0 if job.finished else 1))}


@hydra.main(version_base="1.3", config_path=None)
def _one(config: Any) -> int:
    """Run one job where the launcher wants it; its exit status."""
    listed = json.loads(Path(config.jobs).read_text())[str(config.job)]
    job = Job(config.job, listed["words"], {}, Path(listed["folder"]))
    command, environment = [sys.executable, "-m", "ftcore", *job.words], {**os.environ, ONE_JOB: str(job.folder)}
    with job.log.open("a") as output:
        return subprocess.run(command, stdout=output, stderr=output, env=environment).returncode


if __name__ == "__main__":
    _one()
