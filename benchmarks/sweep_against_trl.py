"""A sweep of 8 short jobs against eight runs of TRL on the same rows: seconds and their ratio.

    python benchmarks/sweep_against_trl.py [pairs]

SFT of smollm2_135m on short questions and answers, 5 steps of 8 rows, 8 learning rates; nothing is compared with the base model.
TRL's runs are processes one after another, as by hand. Results: benchmarks/results/sweep.json.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import table
from against_trl import CASES, SHARED

HERE = Path(__file__).parent
RATES = [f"{k}e-4" for k in range(1, 9)]
ROWS = HERE.parent / "ftcore" / "datasets" / "medical" / "sft.train.jsonl"


def run(words: list[str], folder: str) -> float:
    """Wall-clock seconds of a command that must succeed."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print each pair and write the medians."""
    pairs = []
    for number in range(int(sys.argv[1]) if len(sys.argv) > 1 else 1):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "rows.jsonl").write_text("".join(_rows()))
            against = [str(HERE / "against_trl.py"), "sft", "--folder", folder, "--steps", "4", "--side"]
            run([*against, "ftcore"], folder)  # writes down the order of rows
            settings = [word for word in SHARED if not word.startswith("method.lr=")] + CASES["sft"][2]
            settings += [f"data.path={folder}/rows.jsonl", "data.test_share=0", "max_steps=5"]
            swept = run(["-m", "ftcore", "-m", f"method.lr={','.join(RATES)}", *settings, "output_dir=swept"], folder)
            alone = sum(run([*against, "trl"], folder) for _ in RATES)
        pairs.append((swept, alone))
        print(f"{number}: sweep {swept:.1f} s, TRL {alone:.1f} s, {alone / swept:.2f} times", flush=True)
    sweep, trl = (statistics.median(column) for column in zip(*pairs, strict=True))
    result = {"jobs": len(RATES), "sweep_s": sweep, "trl_s": trl, "speed": trl / sweep, "pairs": pairs}
    (HERE / "results" / "sweep.json").write_text(json.dumps(result, indent=1) + "\n")
    table.write()
    print(json.dumps(result))


def _rows() -> list[str]:
    """Questions and answers in the columns that the benchmark's settings expect."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()[:96]]
    return [json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) + "\n" for row in rows]


if __name__ == "__main__":
    main()
