"""The queue of jobs, on the disk: commands of ftcore, one at a time, each in a process of its own that outlives the page.

`python -m ftcore.runs.queue <output_dir>` works off the queue and ends; whoever queues a job starts it. Training goes before
answers that are written ahead, so these wait while a job trains.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
from filelock import FileLock, Timeout

from ftcore.files import write_json
from ftcore.run_folder import Run, started

FOLDER = ".queue"
Kind = Literal["train", "answers"]
ENDED = ("done", "failed", "stopped", "lost")


@dataclass(frozen=True)
class Job:
    """A command in the queue.

    Args:
        number: its place.
        kind: what it does.
        title: what a person reads.
        words: of the command line, behind `python -m ftcore`.
        state: queued, running, done, failed, stopped, or lost (nobody saw its end).
        process: its number and when it was started, once it was.
        exit: its exit status, once it has ended.
        begun: when, in seconds since 1970.
    """

    number: int
    kind: Kind
    title: str
    words: list[str]
    state: str = "queued"
    process: tuple[int, str] | None = None
    exit: int | None = None
    begun: float | None = None
    ended: float | None = None


class Queue:
    """The jobs of an output folder."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir, self.folder = output_dir, output_dir / FOLDER

    def jobs(self) -> list[Job]:
        """All jobs, the newest first."""
        found = [self.job(int(file.stem)) for file in self.folder.glob("*.json")]
        return sorted((job for job in found if job), key=lambda job: job.number, reverse=True)

    def job(self, number: int) -> Job | None:
        """The job of a number."""
        try:
            return Job(**json.loads((self.folder / f"{number}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def log(self, number: int) -> Path:
        """What a job printed."""
        return self.folder / f"{number}.log"

    def add(self, kind: Kind, title: str, words: Sequence[str]) -> Job:
        """Put a job at the end of the queue, and see to it that the queue is worked off."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "numbers"):
            job = Job(max((job.number for job in self.jobs()), default=0) + 1, kind, title, list(words))
            self._write(job)
        self.wake()
        return job

    def wake(self) -> None:
        """Work off the queue in a process of its own, if it is not being done."""
        if any(job.state in ("queued", "running") for job in self.jobs()):
            command = [sys.executable, "-m", "ftcore.runs.queue", str(self.output_dir)]
            nothing = subprocess.DEVNULL
            subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)

    def stop(self, number: int) -> None:
        """Take a job out of the queue, or end it by SIGTERM, at which training saves what it has."""
        job = self.job(number)
        if job and job.state == "queued":
            self._write(replace(job, state="stopped"))
        elif job and (process := running(job)):
            process.terminate()

    def run_of(self, job: Job) -> Run | None:
        """The run that a job of training made, once it is there."""
        name = next((word.removeprefix("name=") for word in job.words if word.startswith("name=")), None)
        resumed = next((word.removeprefix("resume=") for word in job.words if word.startswith("resume=")), None)
        if resumed:
            return Run(resumed)
        runs = Run.named(self.output_dir / name) if name and job.begun else []
        return next((run for run in runs if run.folder.stat().st_mtime >= (job.begun or 0)), None)

    def work(self) -> None:
        """Run what is queued, one after the other, until nothing is; nothing when another process does."""
        try:
            with FileLock(self.folder / "worker", timeout=0):
                while job := self._next():
                    self._run(job)
        except Timeout:
            pass

    def _next(self) -> Job | None:
        """The next job: one that is running still, when its worker was killed; else training first, then in their order."""
        open_jobs = [job for job in self.jobs() if job.state not in ENDED]
        order = sorted(open_jobs, key=lambda job: (job.state != "running", job.kind != "train", job.number))
        return order[0] if order else None

    def _run(self, job: Job) -> None:
        if job.state == "running":
            process = running(job)
            if process:
                process.wait()
            self._write(replace(job, state="lost", ended=time.time()))
            return
        with self.log(job.number).open("ab") as log:
            command = [sys.executable, "-m", "ftcore", *job.words]
            quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            child = subprocess.Popen(command, **quiet, start_new_session=True, env=os.environ | {"COLUMNS": "120"})  # type: ignore[call-overload]
        job = replace(job, state="running", process=(child.pid, started(child.pid)), begun=time.time())
        self._write(job)
        code = child.wait()
        state = "done" if code == 0 else "stopped" if code in (130, 143) or code < 0 else "failed"
        self._write(replace(job, state=state, exit=code, ended=time.time()))

    def _write(self, job: Job) -> None:
        write_json(self.folder / f"{job.number}.json", asdict(job))


def running(job: Job) -> psutil.Process | None:
    """The process of a job, if it is running still."""
    try:
        alive = job.process and started(job.process[0]) == job.process[1]
        return psutil.Process(job.process[0]) if job.process and alive else None
    except psutil.Error:  # it has just ended
        return None


if __name__ == "__main__":
    Queue(Path(sys.argv[1])).work()
