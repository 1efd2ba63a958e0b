"""A job of a sweep: its command, its folder, what it gave."""

import hashlib
import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcore.settings import Config

# The folder of the job, where a command is one job of a sweep: a sweep file among its words then starts no sweep.
ONE_JOB = "FTCORE_SWEEP_JOB"
ONE_JOB_OF_WANDB = "WANDB_SWEEP_ID"  # set by its agents

ERROR = re.compile(r"^(\w*(?:Error|Stopped|OutOfMemory|Exception)\b.*)", re.MULTILINE)


@dataclass
class Job:
    """One combination of a sweep: the words of its command, what it changes, and the folder that holds its run."""

    number: int
    words: list[str]
    changes: dict[str, Any]
    folder: Path

    @property
    def summary(self) -> Path | None:
        """summary.json of its finished run."""
        return next(iter(sorted(self.folder.glob("*/summary.json"), reverse=True)), None)

    @property
    def submitted(self) -> bool:
        """Whether it was handed to SLURM, which goes on with it by itself."""
        return any(self.folder.glob("*/slurm"))

    @property
    def finished(self) -> bool:
        """Whether it needs no process here any more."""
        return bool(self.summary) or self.submitted

    @property
    def metrics(self) -> Path | None:
        """metrics.jsonl of its newest run."""
        return next(iter(sorted(self.folder.glob("*/metrics.jsonl"), reverse=True)), None)

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
    decides = {key: value for key, value in config.items() if key not in ("sweep", "logger", "output_dir", "dry_run")}
    said = json.dumps([decides, searched, config["sweep"]["objective"]], default=str)
    name = f"sweep-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    return Path(config["output_dir"]).expanduser().resolve() / config["name"] / name


def job_of(number: int, changes: dict[str, str], shared: list[str], folder: Path) -> Job:
    """A job of the words that all `shared`: its command goes on where it stopped, in a folder of its own."""
    said = json.dumps(sorted(changes.items()))
    name = f"{number}-{hashlib.sha256(said.encode()).hexdigest()[:6]}"
    own = [f"output_dir={folder}", f"name={name}", "resume=auto"]
    kept = [word for word in shared if word.split("=")[0].lstrip("+") not in ("output_dir", "name", "resume")]
    return Job(number, [*kept, *(f"{key}={value}" for key, value in changes.items()), *own], changes, folder / name)


def value(summary: Any, key: str) -> Any:
    """A number of summary.json by its dotted key; None when it is not there."""
    for part in key.split("."):
        summary = summary.get(part) if isinstance(summary, dict) else None
    return summary
