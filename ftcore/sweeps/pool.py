"""Jobs of a sweep: a process each, forked from a server that has imported everything, so that a job begins in about a second.

The server only imports: no tensor is computed and no thread started in it before it forks. A job that raises, is killed or
takes too long touches no other.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ftcore.cli.command import run_job
from ftcore.models import weights
from ftcore.sweeps.job import Job, reason

GRACE = 10  # seconds that stopped jobs have to save


@dataclass
class Running:
    """A job and its process."""

    job: Job
    process: Any
    deadline: float


def start_server() -> None:
    """Let the server of all jobs begin to import, beside what this process does until it needs it."""
    get_context("forkserver").set_forkserver_preload(["ftcore.runs.preload"])
    # Ctrl-C is for this process alone, which then ends the jobs one by one.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, before)


@dataclass
class Pool:
    """At most `size` jobs at the same time, each ended after `time_limit` seconds. `wait` gives them back as they end."""

    size: int
    time_limit: float | None = None
    running: list[Running] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context = get_context("forkserver")
        start_server()
        first = self.context.Process()  # does nothing: waits until all is imported
        first.start()
        first.join()
        self.threads = max((os.cpu_count() or 1) // self.size, 1)

    def start(self, job: Job) -> None:
        """Begin a job; there must be room."""
        job.folder.mkdir(parents=True, exist_ok=True)
        given = (job.words, job.log, self.threads, dict(os.environ), weights.checked)
        process = self.context.Process(target=_work, args=given)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # no job that nobody knows of
        process.start()
        self.running.append(Running(job, process, time.monotonic() + (self.time_limit or float("inf"))))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    @property
    def full(self) -> bool:
        """Whether another job must wait."""
        return len(self.running) >= self.size

    def wait(self, seconds: float | None = None) -> tuple[Job, str] | None:
        """A job that ended, and why it failed ("" when it did not). None when `seconds` pass before one does."""
        until = time.monotonic() + (float("inf") if seconds is None else seconds)
        while True:
            nearest = min([until, *(one.deadline for one in self.running)]) - time.monotonic()
            connection.wait([one.process.sentinel for one in self.running], max(min(nearest, 3600), 0))
            for one in self.running:
                late = time.monotonic() > one.deadline
                if late or one.process.exitcode is not None:
                    return self._ended(one, late)
            if time.monotonic() >= until:
                return None

    def stop(self, job: Job) -> None:
        """Ask a job to save and end."""
        for one in self.running:
            if one.job is job:
                with suppress(ProcessLookupError):
                    os.kill(one.process.pid, signal.SIGTERM)

    def close(self) -> None:
        """Let all jobs save what they have, and end them."""
        for one in self.running:
            self.stop(one.job)
        until = time.monotonic() + GRACE
        try:
            for one in self.running:
                one.process.join(max(until - time.monotonic(), 0))
        finally:  # also when Ctrl-C comes again
            for one in self.running:
                _kill(one.process)

    def _ended(self, one: Running, late: bool) -> tuple[Job, str]:
        _kill(one.process)  # also what it started
        self.running.remove(one)
        if late:
            return one.job, f"longer than {self.time_limit:,.0f} s"
        return one.job, reason(one.job, one.process.exitcode)


def _kill(process: Any) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)  # the group of `_work`
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.join()


def _work(words: list[str], log: Path, threads: int, environment: dict[str, str], whole: dict[Path, list[Any]]) -> None:
    """The job, in its process: a group of its own, its share of the cores, the environment of now, weights found `whole`."""
    os.setsid()
    weights.checked.update(whole)
    os.environ.clear()
    os.environ.update(environment)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    sys.exit(run_job(words, log))


def progress() -> Progress:
    """How many jobs have ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[failed]} failed"))
