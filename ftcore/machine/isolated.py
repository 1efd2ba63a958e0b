"""Processes that can be ended with all they started: each leads a process group of its own.

Ctrl-C reaches none of them: the process that started them ends them, each in its own way.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import TypeVarTuple

Args = TypeVarTuple("Args")
Context = SpawnContext | ForkServerContext
PR_SET_PDEATHSIG = 1  # of prctl, on Linux
# By which a terminal or a unit ends all its processes; SIGHUP: it is closed.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def heeded(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """All but SIGHUP where this process ignores it: nohup lets it outlive its terminal."""
    outlives = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in signals if not (outlives and number == signal.SIGHUP)]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let what ends this process wait until the block ends: no process is left half started, or unknown to who would end it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start(context: Context, work: Callable[[*Args], object], *args: *Args, daemon: bool = False) -> BaseProcess:
    """Start `work(*args)` in a new process, which is returned; call it, and keep the process, inside `uninterrupted`.

    On Linux the process also dies with its parent: the thread that called this, or the fork server.
    `daemon` is that of multiprocessing: such a process ends with this one, and starts none by multiprocessing.
    """
    process = context.Process(target=_lead, args=(work, *args), daemon=daemon)
    process.start()
    return process


def end(process: BaseProcess) -> None:
    """End a process and all it started, at once."""
    assert process.pid
    with suppress(OSError):  # it leads no group yet, or has left nothing behind
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _lead(work: Callable[[*Args], object], *args: *Args) -> None:
    """In the new process: leave the terminal, let SIGTERM end it whatever its parent did with it, then work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP})
    os.setsid()
    if sys.platform == "linux":  # what hangs would not notice by itself that the parent is gone
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    work(*args)
