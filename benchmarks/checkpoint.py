"""What a checkpoint costs beside torch.save of the same tensors, taken in turn.

    python benchmarks/checkpoint.py --mb 400 --times 9

torch.save is timed as trainers use it, and with the same wait for the disk that a checkpoint has (os.fsync).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ftcore.train import checkpoint


def main() -> None:
    """Time the three in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=400)
    parser.add_argument("--times", type=int, default=9)
    given = parser.parse_args()
    tensors = {f"weight/{k}": torch.randn(1000, 250) for k in range(given.mb)}
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place)
        ways: dict[str, Callable[[int], object]] = {
            "checkpoint": lambda k: checkpoint.write(folder, k, tensors, {"step": k}, keep=2),
            "torch.save": lambda k: torch.save(tensors, folder / "saved.pt"),
            "torch.save, fsync": lambda k: flushed(tensors, folder / "flushed.pt"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for k in range(given.times + 1):
            for name, save in ways.items():
                os.sync()  # nobody pays for what another left to be written
                started = time.perf_counter()
                save(k)
                seconds[name] += [time.perf_counter() - started] if k else []  # the first of each warms up
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = {name: round(medians["checkpoint"] / value, 2) for name, value in medians.items()}
    print(json.dumps({"mb": given.mb, "medians": medians, "checkpoint is so many times": ratios, "all": seconds}))


def flushed(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """torch.save, on the disk when it returns."""
    with file.open("wb") as content:
        torch.save(tensors, content)
        os.fsync(content.fileno())


if __name__ == "__main__":
    main()
