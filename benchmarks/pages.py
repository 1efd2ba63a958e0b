"""How long pages take: 1,000 runs in a list, and a run of 100,000 steps.

    python benchmarks/pages.py [runs] [steps]

Each line is of a process of its own: the first request, and the median of five more.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from starlette.testclient import TestClient

from ftcore.config.compose import load_config, of_run
from ftcore.run_folder import Run
from ftcore.ui.server import application

HOME = "http://127.0.0.1:8000"
COLUMNS = ("loss", "nll", "retention", "lr", "grad_norm", "tokens_per_second", "tokens", "entropy", "kl", "reward")


def make(folder: Path, runs: int, steps: int) -> None:
    """Run folders as runs leave them."""
    config, draw = of_run(load_config([])), random.Random(0)
    interval = {"low": 0.1, "high": 0.5, "verdict": "better", "rows_needed": None}
    for k in range(runs + 1):
        run = Run(folder / f"name{k % 40}" / f"2026-01-{1 + k // 40:02d}_00-00-{k % 40:02d}")
        run.folder.mkdir(parents=True)
        run.write_config({**config, "name": run.folder.parent.name, "seed": k})
        side = {"accuracy": draw.random(), "loss": draw.random(), "probe_perplexity": 40.0, "rows": 168}
        scores = {"base": side, "tuned": side, "intervals": {"accuracy": interval, "loss": interval}}
        answers = {
            "prompt": "What?",
            "expected": "x",
            "base": "y",
            "tuned": "x",
            "base_right": False,
            "tuned_right": True,
        }
        run.finish({**scores, "data_rows": 504, "seconds": 60.0}, ({"id": str(n), **answers} for n in range(168)), {})
        lines = steps if k == runs else 20
        rows = ({"step": n} | {f"train/{name}": draw.random() for name in COLUMNS} for n in range(1, lines + 1))
        run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run.begin({"steps": lines, "first_batch": []})
    (folder / "longest").write_text(str(run.folder.relative_to(folder)))


def measure(folder: Path, path: str) -> None:
    """Print the times of a page, and its size."""
    client = TestClient(application(folder, False, "token", "ftcore"), base_url=HOME)
    client.get("/style.css?token=token")
    times = []
    for _ in range(6):
        begun = time.perf_counter()
        answer = client.get(path)
        times.append(time.perf_counter() - begun)
        assert answer.status_code == 200
    name, size = path.split("/")[1] or "all runs", len(answer.content)
    print(f"{name:10} first {times[0]:.2f} s, then {median(times[1:]):.2f} s, {size:,} bytes")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(Path(sys.argv[2]), sys.argv[3])
    else:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place).resolve()
            make(folder, *map(int, [*sys.argv[1:3], *("1000", "100000")[len(sys.argv[1:3]) :]]))
            for path in ("/", f"/runs/{(folder / 'longest').read_text()}"):
                subprocess.run([sys.executable, __file__, "measure", str(folder), path], check=True)
