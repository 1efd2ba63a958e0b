"""Jobs of a sweep by a launcher plugin of Hydra (joblib, submitit, ray), when the command line names one.

Such a launcher composes each job from Hydra's own config. So it gets a config of two keys, the file that lists the jobs and the
number of one of them, and the job itself composes as always.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra

from ftcore.errors import ConfigError
from ftcore.sweeps.job import Job, reason

FILE = "jobs.json"


def run_with_hydra(launcher: list[str], jobs: list[Job], folder: Path) -> dict[int, str]:
    """Run the jobs that are not finished with the launcher that `launcher` names and sets up; number -> reason of the failed.

    Raises `ConfigError` when Hydra does not know the launcher.
    """
    pending = {job.number: job for job in jobs if not job.summary}
    if not pending:
        return {}
    listed = {number: [job.words, str(job.log)] for number, job in pending.items()}
    (folder / FILE).write_text(json.dumps(listed))
    words = [f"+jobs='{folder / FILE}'", f"+job={','.join(map(str, pending))}", *launcher]
    quiet = [
        "hydra/hydra_logging=none",
        f"hydra.sweep.dir='{folder / 'hydra'}'",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
    ]
    done = subprocess.run([sys.executable, "-m", "ftcore.sweeps.hydra_launcher", "-m", *words, *quiet])
    if done.returncode and not any(job.log.exists() for job in pending.values()):
        raise ConfigError(
            f"Hydra could not run {' '.join(launcher)}; install its plugin, such as hydra-joblib-launcher."
        )
    return {number: why for number, job in pending.items() if (why := reason(job, 0 if job.summary else 1))}


@hydra.main(version_base="1.3", config_path=None)
def _one(config: Any) -> int:
    from hydra.core.global_hydra import GlobalHydra

    from ftcore.cli.command import run_job

    GlobalHydra.instance().clear()  # the job composes its own config
    words, log = json.loads(Path(config.jobs).read_text())[str(config.job)]
    return run_job(words, Path(log))


if __name__ == "__main__":
    _one()
