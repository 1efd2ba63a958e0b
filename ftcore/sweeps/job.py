"""A job of a sweep: its command, its folder, what it gave."""

import hashlib
import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from ftcore.config.roles import leaves_of
from ftcore.run_folder import Run, Summary
from ftcore.settings import Config

# The folder of the job, where a command is one job of a sweep: a sweep file among its words then starts no sweep.
ONE_JOB = "FTCORE_SWEEP_JOB"
ANSWER = "answer.json"
ONE_JOB_OF_WANDB = "WANDB_SWEEP_ID"  # set by its agents

ERROR = re.compile(r"^(\w*(?:Error|Stopped|OutOfMemory|Exception)\b.*)", re.MULTILINE)


@dataclass
class Job:
    """One combination of a sweep: the words of its command, what it changes, and the folder that holds its run."""

    number: int
    words: list[str]
    changes: dict[str, str]
    folder: Path

    @property
    def runs(self) -> list[Run]:
        """Its runs, the newest first."""
        return Run.named(self.folder)

    @property
    def result(self) -> Summary | None:
        """The summary of its finished run, or what its verb answered; None before that."""
        if self.answer.is_file():
            return Summary(json.loads(self.answer.read_text()))
        return next((run.summary for run in self.runs if run.finished), None)

    @property
    def submitted(self) -> bool:
        """Whether it was handed to SLURM, which goes on with it by itself."""
        return any(run.slurm.is_dir() for run in self.runs)

    @property
    def finished(self) -> bool:
        """Whether it needs no process here any more."""
        return self.result is not None or self.submitted

    @property
    def answer(self) -> Path:
        """What its verb answered, where it is one that answers."""
        return self.folder / ANSWER

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.folder / "output.log"


def reason(job: Job, code: int) -> str:
    """Why a job failed: its own last error, or the signal that ended it."""
    if not code and job.finished:
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    errors = ERROR.findall(job.log.read_text(errors="replace"))
    return errors[-1] if errors else f"exit code {code}; see {job.log}"


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
    decides = [leaves_of(config, "result", "rows", "scores"), config["verb"], config["run"]]
    said = json.dumps([decides, searched, config["sampler"], config["sweep"]["objective"]], default=str)
    name = f"sweep-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    return Path(config["output_dir"]).expanduser().resolve() / config["name"] / name


def job_of(number: int, changes: dict[str, str], shared: list[str], folder: Path) -> Job:
    """A job of the words that all `shared`: its command goes on where it stopped, in a folder of its own."""
    said = json.dumps(sorted(changes.items()))
    name = f"{number}-{hashlib.sha256(said.encode()).hexdigest()[:6]}"
    own = {"output_dir": str(folder), "name": name, "resume": "auto"}
    kept = [word for word in shared if word.split("=")[0].lstrip("+") not in own]
    words = [f"{key}={value}" for key, value in (changes | own).items()]
    return Job(number, [*kept, *words], changes, folder / name)


def keep_answer(answer: object) -> None:
    """Write what a verb answers into the folder of the job that this process is, for the sweep's table."""
    folder = Path(os.environ.get(ONE_JOB) or os.devnull)
    if folder.is_dir() and isinstance(answer, dict):
        (folder / ANSWER).write_text(json.dumps(answer, default=str))
