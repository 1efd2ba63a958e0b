"""Seconds from the command to the first logged step, and of `--help` and a wrong key: what a user waits for.

    python benchmarks/start.py [runs]

The weights are cached; nothing else is kept from one run to the next. Results: benchmarks/results/start.json.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {
    "--help": ["--help"],
    "a wrong key": ["method.lrr=1"],
    "first step, smollm2_135m": ["max_steps=1", "logger=none", "evaluate.enabled=false"],
    "first step with the base model's scores before it": ["max_steps=1", "logger=none"],
}


def seconds(words: list[str], folder: str) -> float:
    """From the start of a command to its first step, or to its end when it has none."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "ftcore", *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not any(
        file.stat().st_size for file in Path(folder).glob("runs/*/*/metrics.jsonl")
    ):
        time.sleep(0.02)
    took = time.perf_counter() - start
    process.wait()
    return took


def main() -> None:
    """Print the median of each command, in turn."""
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        for name, words in COMMANDS.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(round(seconds(words, folder), 2))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "start.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, times in found.items():
        print(f"{name}: {statistics.median(times):.2f} s of {times}")


if __name__ == "__main__":
    main()
