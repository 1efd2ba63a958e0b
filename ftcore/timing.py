"""Clocks for the parts of a step; they run only while a step is profiled."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

watches: list["Watch"] = []


@contextmanager
def part(name: str) -> Iterator[None]:
    """What happens here is this part of a step and not of what is around it; only a profiled step asks."""
    watch = watches[-1] if watches else None
    before = watch.switch(name) if watch else ""
    try:
        yield
    finally:
        if watch:
            watch.switch(before)


class Watch:
    """A clock for each part, of which one runs."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.now, self.since = "data", settled_time()

    def switch(self, name: str) -> str:
        """Stop the part that runs, start another; returns the one that ran."""
        moment, before = settled_time(), self.now
        self.seconds[before] += moment - self.since
        self.now, self.since = name, moment
        return before


def settled_time() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what was asked for before is done
    return time.perf_counter()
