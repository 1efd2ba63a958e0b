"""Runs the jobs of a sweep: a process each, forked from a server that has imported everything, so that a job begins in a second.

The server only imports: no tensor is computed and no thread started in it before it forks. A job that raises, is killed or
takes too long touches no other.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ftcore.console import console
from ftcore.machine import isolated
from ftcore.models import weights
from ftcore.settings import Sweep
from ftcore.sweeps.job import ONE_JOB, Job, why_failed

GRACE = 10  # seconds that stopped jobs have to save

# Runs a command line and returns its exit status; a function that another process can import.
RunCommand = Callable[[list[str]], int]


@dataclass
class Running:
    """A job, its process, and when it is ended."""

    job: Job
    process: BaseProcess
    deadline: float


def start_server() -> None:
    """Let the server of all jobs begin to import, beside what this process does until it needs it."""
    get_context("forkserver").set_forkserver_preload(["ftcore.runs.preload"])
    # These are for this process alone, which then ends the jobs one by one. They may reach all processes of a terminal or unit.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in isolated.ENDING}
    forkserver.ensure_running()
    for number, handler in before.items():
        signal.signal(number, handler)


class Pool:
    """At most `size` jobs at the same time, each ended after `time_limit` seconds. `wait` gives them back as they end."""

    def __init__(self, run_command: RunCommand, size: int, time_limit: float = math.inf) -> None:
        self.run_command, self.size, self.time_limit = run_command, size, time_limit
        self.running: dict[int, Running] = {}  # by the number of the job
        self.context = get_context("forkserver")
        start_server()
        first = self.context.Process()  # does nothing: waits until all is imported
        first.start()
        first.join()

    def start(self, job: Job) -> None:
        """Begin a job; there must be room."""
        job.folder.mkdir(parents=True, exist_ok=True)
        threads = str(max((os.cpu_count() or 1) // self.size, 1))
        environment = {**os.environ, ONE_JOB: str(job.folder), "OMP_NUM_THREADS": threads}
        with isolated.uninterrupted():
            process = isolated.start(self.context, _work, self.run_command, job, environment, weights.checked)
            self.running[job.number] = Running(job, process, time.monotonic() + self.time_limit)

    def wait(self, seconds: float = math.inf) -> Job | None:
        """A job that ended, with its `failure` if it failed. None when `seconds` pass before one does."""
        until = time.monotonic() + seconds
        while True:
            nearest = min([until, *(one.deadline for one in self.running.values())]) - time.monotonic()
            connection.wait([one.process.sentinel for one in self.running.values()], max(min(nearest, 3600), 0))
            for one in self.running.values():
                late = time.monotonic() > one.deadline
                if late or one.process.exitcode is not None:
                    isolated.end(one.process)  # also what it started
                    del self.running[one.job.number]
                    too_long = f"longer than {self.time_limit:,.0f} s"
                    one.job.failure = too_long if late else why_failed(one.job, one.process.exitcode or 0)
                    return one.job
            if time.monotonic() >= until:
                return None

    def stop(self, job: Job) -> None:
        """Ask a job to save and end."""
        self.running[job.number].process.terminate()

    def close(self) -> None:
        """Let all jobs save what they have, and end them."""
        for one in self.running.values():
            one.process.terminate()
        until = time.monotonic() + GRACE
        try:
            for one in self.running.values():
                one.process.join(max(until - time.monotonic(), 0))
        finally:  # also when Ctrl-C comes again
            for one in self.running.values():
                isolated.end(one.process)


def _work(run_command: RunCommand, job: Job, environment: dict[str, str], checked: dict[Path, list[Any]]) -> None:
    """The job, in its process: its share of the cores, the environment of now, weights that the parent has `checked`."""
    with job.log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    weights.checked.update(checked)
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.exit(run_command(job.words))


class Source:
    """Where the jobs of a sweep come from; subclasses override what they need."""

    jobs: list[Job]  # those that there are so far, in order
    total: int  # how many there will be
    done: int  # how many of them an earlier command has done
    look_every: float = math.inf  # seconds between looks at what runs

    def ask(self) -> Job | None:
        """The next job to run; None when there is no other."""

    def tell(self, job: Job) -> None:
        """Hear that a job has ended."""

    def look(self, pool: Pool) -> None:
        """Look at the jobs that run, and stop those that are not worth their time."""


def run_jobs(source: Source, run_command: RunCommand, settings: Sweep) -> None:
    """Run all jobs of a source, as many at a time as the sweep's settings allow."""
    size = min(settings["n_jobs"], max(source.total - source.done, 1))
    words = [TextColumn(text, markup=False) for text in ("jobs", "{task.fields[failed]} failed")]
    columns = (words[0], BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), words[1])
    with (
        Progress(*columns, console=console) as progress,
        closing(Pool(run_command, size, settings["time_limit"] or math.inf)) as pool,
    ):
        task = progress.add_task("jobs", total=source.total, completed=source.done, failed=0)
        while True:
            while len(pool.running) < size and (job := source.ask()):
                pool.start(job)
            if not pool.running:
                return
            if ended := pool.wait(source.look_every):
                source.tell(ended)
                progress.update(task, advance=1, failed=sum(bool(job.failure) for job in source.jobs))
            else:
                source.look(pool)
