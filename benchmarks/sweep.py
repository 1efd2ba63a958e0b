"""A sweep of 12 short jobs against the same 12 commands one after another: seconds and their ratio.

    python benchmarks/sweep.py [pairs]

Both begin with nothing but cached weights and rows; one sweep, then 12 commands, as many times as `pairs` says.
"""

import statistics
import subprocess
import sys
import tempfile
import time

JOBS = 12
SETTINGS = ["model=tiny", "max_steps=5", "logger=none"]


def seconds(*words: str, folder: str) -> float:
    """Wall-clock time of one command that must succeed."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ftcore", *words], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print each pair and the medians."""
    pairs = []
    for number in range(int(sys.argv[1]) if len(sys.argv) > 1 else 1):
        with tempfile.TemporaryDirectory() as folder:
            seconds(*SETTINGS, "seed=99", folder=folder)
            swept = seconds("-m", f"seed=range({JOBS})", *SETTINGS, folder=folder)
            alone = sum(seconds(f"seed={seed}", "output_dir=alone", *SETTINGS, folder=folder) for seed in range(JOBS))
        pairs.append((swept, alone))
        print(f"{number}: sweep {swept:.1f} s, {JOBS} commands {alone:.1f} s, ratio {swept / alone:.3f}", flush=True)
    print("medians:", *(round(statistics.median(column), 1) for column in zip(*pairs, strict=True)))


if __name__ == "__main__":
    main()
