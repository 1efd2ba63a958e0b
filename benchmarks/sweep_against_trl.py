"""A sweep of 8 short jobs against eight runs of TRL on the same rows: seconds and their ratio.

    python benchmarks/sweep_against_trl.py [pairs] [steps]

SFT of smollm2_135m on short questions and answers, steps of 8 rows, 8 learning rates; nothing is compared with the base model.
TRL's runs are processes one after another, as by hand, and then as many at a time as there are cores, as the sweep's jobs are.
Results: benchmarks/results/sweep.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import table
from cases import CASES, SHARED

HERE = Path(__file__).parent
CORES = os.cpu_count() or 1
RATES = [f"{k}e-4" for k in range(1, 9)]
ROWS = HERE.parent / "ftcore" / "datasets" / "medical" / "sft.train.jsonl"


def run(words: list[str], folder: str) -> float:
    """Wall-clock seconds of a command that must succeed."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print each round and write the medians."""
    rounds, steps = (int(word) for word in [*sys.argv[1:], *["1", "5"][len(sys.argv) - 1 :]])
    found = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(_measured(folder, steps))
        print(
            f"{number}: sweep {found[-1][0]:.1f} s, TRL {found[-1][1]:.1f} s, at the same time {found[-1][2]:.1f} s",
            flush=True,
        )
    sweep, alone, together = (statistics.median(column) for column in zip(*found, strict=True))
    speeds = {"speed": alone / sweep, "speed_together": together / sweep}
    seconds = {"sweep_s": sweep, "trl_s": alone, "trl_together_s": together}
    results = HERE / "results" / "sweep.json"
    kept = json.loads(results.read_text()) if results.exists() else {}
    kept[str(steps)] = {"jobs": len(RATES), **seconds, **speeds, "rounds": found}
    results.write_text(json.dumps(kept, indent=1) + "\n")
    table.write()
    print(json.dumps(speeds))


def _measured(folder: str, steps: int) -> tuple[float, float, float]:
    """Seconds of the sweep, of TRL's runs one after another, and of as many at the same time as there are cores."""
    Path(folder, "rows.jsonl").write_text("".join(_rows()))
    against = [str(HERE / "against_trl.py"), "sft", "--folder", folder, "--steps", str(steps - 1), "--side"]
    run([*against, "ftcore"], folder)  # writes down the order of rows
    settings = [word for word in SHARED if not word.startswith("method.lr=")] + CASES["sft"].words
    settings += [f"data.path={folder}/rows.jsonl", "data.test_share=0", f"max_steps={steps}", f"sweep.n_jobs={CORES}"]
    swept = run(["-m", "ftcore", "-m", f"method.lr={','.join(RATES)}", *settings, "output_dir=swept"], folder)
    alone = sum(run([*against, "trl"], folder) for _ in RATES)
    start = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(lambda _: run([*against, "trl"], folder), RATES))
    del os.environ["OMP_NUM_THREADS"]
    return swept, alone, time.perf_counter() - start


def _rows() -> list[str]:
    """Questions and answers in the columns that the benchmark's settings expect."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()[:96]]
    return [json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) + "\n" for row in rows]


if __name__ == "__main__":
    main()
