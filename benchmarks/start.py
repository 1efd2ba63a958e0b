"""Seconds from the command to the first logged step, and of `--help` and a wrong key: what a user waits for.

    python benchmarks/start.py [runs]

The weights are cached. In a round nothing else is, but the last command finds the base model's scores, which the one before it
kept. Results: benchmarks/results/start.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ftcore.files import home

COMMANDS = {
    "--help": ["--help"],
    "a wrong key": ["method.lrr=1"],
    "first step, smollm2_135m": ["max_steps=1", "logger=none", "evaluate.enabled=false"],
    "first step with the base model's scores before it": ["max_steps=1", "logger=none"],
    "first step with these scores kept": ["max_steps=1", "logger=none", "name=again"],
}


def seconds(words: list[str], folder: str) -> float:
    """From the start of a command to its first step, or to its end when it has none."""
    before, start = set(_steps(folder)), time.perf_counter()
    command, given = [sys.executable, "-m", "ftcore", *words], os.environ | {"FTCORE_HOME": f"{folder}/home"}
    process = subprocess.Popen(command, cwd=folder, env=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not set(_steps(folder)) - before:
        time.sleep(0.02)
    took = time.perf_counter() - start
    process.terminate()
    process.wait()
    return took


def _steps(folder: str) -> list[Path]:
    """Logs of the runs that have taken a step."""
    return [file for file in Path(folder).glob("runs/*/*/metrics.jsonl") if file.stat().st_size]


def main() -> None:
    """Print the median of each command, in turn."""
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "home").mkdir()
            Path(folder, "home", "models").symlink_to(home() / "models")
            for name, words in COMMANDS.items():
                found[name].append(round(seconds(words, folder), 2))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "start.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, times in found.items():
        print(f"{name}: {statistics.median(times):.2f} s of {times}")


if __name__ == "__main__":
    main()
