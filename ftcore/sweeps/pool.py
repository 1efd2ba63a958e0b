"""Runs the jobs of a sweep: a process each, forked from a server that has imported everything, so that a job begins in a second.

The server only imports: no tensor is computed and no thread started in it before it forks. A job that raises, is killed or
takes too long touches no other.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ftcore.machine import isolated
from ftcore.models import weights
from ftcore.settings import Sweep
from ftcore.sweeps.job import ONE_JOB, Job, reason

GRACE = 10  # seconds that stopped jobs have to save

# Runs a command line and returns its exit status; a function that another process can import.
RunCommand = Callable[[list[str]], int]


@dataclass
class Running:
    """A job and its process."""

    job: Job
    process: BaseProcess
    deadline: float


def start_server() -> None:
    """Let the server of all jobs begin to import, beside what this process does until it needs it."""
    get_context("forkserver").set_forkserver_preload(["ftcore.runs.preload"])
    # These are for this process alone, which then ends the jobs one by one. They may reach all processes of a terminal or unit.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    forkserver.ensure_running()
    for number, handler in before.items():
        signal.signal(number, handler)


@dataclass
class Pool:
    """At most `size` jobs at the same time, each ended after `time_limit` seconds. `wait` gives them back as they end."""

    run_command: RunCommand
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
        environment = {**os.environ, ONE_JOB: str(job.folder), "OMP_NUM_THREADS": str(self.threads)}
        given = (self.run_command, job, self.threads, environment, weights.checked)
        with isolated.uninterrupted():
            process = isolated.start(self.context, _work, *given)
            self.running.append(Running(job, process, time.monotonic() + (self.time_limit or float("inf"))))

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
                one.process.terminate()

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
                isolated.end(one.process)

    def _ended(self, one: Running, late: bool) -> tuple[Job, str]:
        isolated.end(one.process)  # also what it started
        self.running.remove(one)
        if late:
            return one.job, f"longer than {self.time_limit:,.0f} s"
        code = one.process.exitcode
        assert code is not None
        return one.job, reason(one.job, code)


def _work(
    run_command: RunCommand, job: Job, threads: int, environment: dict[str, str], checked: dict[Path, list[Any]]
) -> None:
    """The job, in its process: its share of the cores, the environment of now, weights that the parent has `checked`."""
    with job.log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    weights.checked.update(checked)
    import torch

    torch.set_num_threads(threads)
    sys.exit(run_command(job.words))


class Source(Protocol):
    """Where the jobs of a sweep come from."""

    jobs: list[Job]  # those that there are so far, in order
    total: int  # how many there will be
    done: int  # how many of them an earlier command has done
    look_every: float | None = None  # seconds between looks at what runs

    def ask(self) -> Job | None:
        """The next job to run; None when there is no other."""

    def tell(self, job: Job, reason: str) -> str:
        """Hear that a job has ended, and the reason if it failed. Returns why it counts as failed, "" when it does not."""
        return reason

    def look(self, pool: Pool) -> None:
        """Look at the jobs that run, and stop those that are not worth their time."""
        return None


def run_jobs(source: Source, run_command: RunCommand, settings: Sweep) -> dict[int, str]:
    """Run all jobs of a source, as many at a time as the sweep's settings allow; number -> reason of those that failed."""
    size, failed = min(settings["n_jobs"], max(source.total - source.done, 1)), dict[int, str]()
    pool = Pool(run_command, size, settings["time_limit"])
    with _progress() as bar, closing(pool):
        task = bar.add_task("jobs", total=source.total, completed=source.done, failed=0)
        while True:
            while not pool.full and (job := source.ask()):
                pool.start(job)
            if not pool.running:
                return failed
            if not (ended := pool.wait(source.look_every)):
                source.look(pool)
                continue
            if why := source.tell(*ended):
                failed[ended[0].number] = why
            bar.update(task, advance=1, failed=len(failed))


def _progress() -> Progress:
    """How many jobs have ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[failed]} failed"))
