"""A job of a sweep: its command, its folder, what it gave."""

import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from ftcore.config.given import as_given
from ftcore.config.roles import values_of
from ftcore.files import expanded, short_hash
from ftcore.run_folder import Run, Summary
from ftcore.settings import Config

# The folder of the job, where a command is one job of a sweep: a sweep file among its words then starts no sweep.
ONE_JOB = "FTCORE_SWEEP_JOB"
ONE_JOB_OF_WANDB = "WANDB_SWEEP_ID"  # set by its agents
ANSWER = "answer.json"
ERROR = re.compile(r"^(\w*(?:Error|Stopped|OutOfMemory|Exception)\b.*)", re.MULTILINE)


@dataclass
class Job:
    """One combination of a sweep: the words of its command, what it changes, the folder that holds its run, why it failed."""

    number: int
    words: list[str]
    changes: dict[str, str]
    folder: Path
    failure: str = ""

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.folder / "output.log"

    @property
    def runs(self) -> list[Run]:
        """Its runs, the newest first."""
        return Run.named(self.folder)

    @property
    def summary(self) -> Summary | None:
        """The summary of its finished run, or what its verb answered; None before that."""
        if (file := self.folder / ANSWER).is_file():
            return Summary(json.loads(file.read_text()))
        return next((run.summary for run in self.runs if run.finished), None)

    @property
    def finished(self) -> bool:
        """Whether it needs no process here any more: it is done, or handed to SLURM, which goes on with it."""
        return self.summary is not None or any(run.slurm.is_dir() for run in self.runs)

    @property
    def state(self) -> str:
        """`done`, or why it is not."""
        if self.summary is not None:
            return "done"
        return self.failure or ("with SLURM" if self.finished else "ended early")

    def score(self, key: str) -> float | None:
        """The number under a dotted key of the summary; None when there is none."""
        return self.summary.score(key) if self.summary else None


def why_failed(job: Job, exit_code: int) -> str:
    """A job's own last error, or the signal that ended it; "" when it did not fail."""
    if not exit_code and job.finished:
        return ""
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    errors = ERROR.findall(job.log.read_text(errors="replace"))
    return errors[-1] if errors else f"exit code {exit_code}; see {job.log}"


def is_one_job() -> bool:
    """Whether this process runs one job of a sweep."""
    return ONE_JOB in os.environ or ONE_JOB_OF_WANDB in os.environ


def as_word(value: object) -> str:
    """A value as it stands in an override.

    >>> as_word(True), as_word("lora")
    ('true', 'lora')
    """
    return value if isinstance(value, str) else json.dumps(value)


def folder_of(config: Config, searched: dict[str, object]) -> Path:
    """The sweep's folder: named by everything that decides its jobs, so that the same command finds it again."""
    decides = [values_of(config, "result", "rows", "scores"), config["verb"], config["run"]]
    name = f"sweep-{short_hash([decides, searched, config['sampler'], config['sweep']['objective']])[:8]}"
    return expanded(config["output_dir"]).resolve() / config["name"] / name


def job_of(number: int, changes: dict[str, str], shared: list[str], folder: Path) -> Job:
    """A job of the words that all `shared`: its command goes on where it stopped, in a folder of its own."""
    name = f"{number}-{short_hash(sorted(changes.items()))[:6]}"
    own = {"output_dir": str(folder), "name": name, "resume": "auto"}
    kept = [word for word in shared if word.split("=")[0].lstrip("+") not in own]
    words = [as_given(f"{key}={value}") for key, value in (changes | own).items()]
    return Job(number, [*kept, *words], changes, folder / name)


def keep_answer(answer: object) -> None:
    """Write what a verb answers into the folder of the job that this process is, for the sweep's table."""
    folder = Path(os.environ.get(ONE_JOB) or os.devnull)
    if folder.is_dir() and isinstance(answer, dict):
        (folder / ANSWER).write_text(json.dumps(answer, default=str))
