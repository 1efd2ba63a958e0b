"""Jobs of a sweep by a launcher plugin of Hydra (joblib, submitit, ray), when the command line names one.

Such a launcher composes each job from Hydra's own config. So it gets a config of one key, the folder of a job, which holds the
words of its command, and the command itself composes as always.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra

from ftcore.config.given import quoted
from ftcore.errors import ConfigError
from ftcore.sweeps.job import ONE_JOB, Job, why_failed

WORDS = "words.json"


def run_with_hydra(launcher: list[str], jobs: list[Job], folder: Path) -> None:
    """Run the jobs that are not finished with the launcher that the words `launcher` name and set up.

    Raises `ConfigError` when Hydra does not know the launcher.
    """
    pending = [job for job in jobs if not job.finished]
    if not pending:
        return
    for job in pending:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / WORDS).write_text(json.dumps(job.words))
    words = [
        *launcher,
        "+job=" + ",".join(quoted(str(job.folder)) for job in pending),
        f"hydra.sweep.dir={quoted(str(folder / 'hydra'))}",
    ]
    words += ["hydra/hydra_logging=none", "hydra/job_logging=none", "hydra.output_subdir=null"]
    command = [sys.executable, "-m", "ftcore.sweeps.hydra_launcher", "-m", *words]
    with subprocess.Popen(command, process_group=0) as launching:
        try:
            launching.wait()
        except BaseException:  # Ctrl-C, SIGTERM: the jobs save and end
            os.killpg(launching.pid, signal.SIGTERM)
            raise
    if launching.returncode and not any(job.log.exists() for job in pending):
        raise ConfigError(f"Hydra cannot run {' '.join(launcher)}: install its plugin, such as hydra-joblib-launcher.")
    for job in pending:
        job.failure = why_failed(job, int(not job.finished))


@hydra.main(version_base="1.3", config_path=None)
def _run_job(config: Any) -> int:
    """Run one job where the launcher wants it; its exit status."""
    job = Job(0, json.loads(Path(config.job, WORDS).read_text()), {}, Path(config.job))
    command, environment = [sys.executable, "-m", "ftcore", *job.words], {**os.environ, ONE_JOB: config.job}
    with job.log.open("a") as output:
        return subprocess.run(command, stdout=output, stderr=output, env=environment).returncode


if __name__ == "__main__":
    _run_job()
