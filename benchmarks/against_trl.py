"""ftcore beside TRL's trainers on the same work: same weights, rows, order, token ids and adapter; in turn, in one run.

    python benchmarks/against_trl.py sft [--pairs 5] [--steps 4] [--data ../shared/data]

Every measurement is a process of its own. A step's time is from the end of one optimizer step to the end of the next, rollouts
and data included; the first is left out. Peak memory is that of the whole process. TRL runs without gradient checkpointing, which
is faster here: `trl` as it comes, `trl_allocator` with ftcore's setting of the C library's allocator, `trl_bf16` with weights and
matmuls in bf16; `trl_defaults` is with checkpointing. `ftcore_<precision>` is ftcore in another precision than the case's. `loop`
is the floor, plain PyTorch (loops.py). `litgpt` is measured when it is installed (litgpt_side.py).
Results: benchmarks/results/<case>.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import table
from cases import CASES, PRECISIONS, SHARED, STAGES, TRL, Case

HERE = Path(__file__).parent
Results = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Measure in turn and print medians and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--beside", nargs="+", help="the sides that ftcore is compared with; all that the case has")
    parser.add_argument("--side", help="measure this one alone, in --folder")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    case = CASES[asked.case]
    if asked.side:
        print("RESULT " + json.dumps(_run(asked.side, case, asked.folder, asked.steps)))
        return
    installed = [side for side in case.beside if side != "litgpt" or find_spec("litgpt")]
    sides = ["ftcore", *(asked.beside or installed)]
    found: Results = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        _rows(case, asked.data, Path(folder), asked.steps)
        for number in range(asked.pairs):
            # ftcore goes first once, since its run writes down the order of rows; after that they take turns.
            for side in sides if number % 2 == 0 else reversed(sides):
                found[side].append(_measured(side, asked.case, folder, asked.steps))
                print(f"{number} {side}: {_line(found[side][-1])}", flush=True)
    _report(asked.case, found)


def _run(side: str, case: Case, folder: Path, steps: int) -> dict[str, Any]:
    if side in TRL:
        import trl_side

        return trl_side.run(
            case, folder, steps, allocator=side == "trl_allocator", checkpointing=side == "trl_defaults",
            bf16=side == "trl_bf16",
        )  # fmt: skip
    if side in PRECISIONS:
        import ftcore_side

        return ftcore_side.run(case, folder, steps, PRECISIONS[side])
    if side == "litgpt":
        import litgpt_side

        return litgpt_side.run(case, folder, steps)
    import loops

    return loops.run(case, folder, steps)


def _rows(case: Case, data: Path, folder: Path, steps: int) -> None:
    """The first rows of the training file, twice as many as the steps take: some may lose their answer when they are cut."""
    count = 2 * case.size * (steps + 1)
    lines = (data / case.data / "train.jsonl").read_text().splitlines()
    chosen = lines[:count] if case.length == 512 else [_joined(lines[k : k + 32]) for k in range(0, 32 * count, 32)]
    (folder / "rows.jsonl").write_text("\n".join(chosen) + "\n")
    if "method=rlhf" in case.words:
        _stages(data, folder)


def _joined(lines: list[str]) -> str:
    """A row whose answer is that of all these questions."""
    rows = [json.loads(line) for line in lines]
    return json.dumps({"prompt": rows[0]["prompt"], "completion": "\n".join(row["completion"] for row in rows)})


def _stages(data: Path, folder: Path) -> None:
    """A policy and a reward model of one step each, at `folder`/<stage>: how good they are changes no time."""
    for stage, (source, method) in STAGES.items():
        words = [word for word in SHARED if not word.startswith("method.lr=")]
        words += [f"data.path={data}/{source}/train.jsonl", "data.test_share=0", f"method={method}", "method.lr=1e-9"]
        command = [sys.executable, "-m", "ftcore", *words, f"name={stage}", "max_steps=1"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        (folder / stage).symlink_to(next((folder / "runs" / stage).iterdir()))


def _measured(side: str, case: str, folder: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, case, "--side", side, "--folder", folder, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return answer


def _line(one: dict[str, Any]) -> str:
    more = " ".join(f"{key} {one[key]}" for key in ("loss", "last", "chosen", "length") if one.get(key) is not None)
    return f"{one['mean_step']:.2f} s/step, {one['peak_gb']:.2f} GB, {more}"


def _report(case: str, found: Results) -> None:
    middle = {
        side: {key: statistics.median(one[key] for one in results) for key in ("mean_step", "peak_gb")}
        for side, results in found.items()
    }
    ours = middle["ftcore"]
    ratios = {
        side: {"speed": other["mean_step"] / ours["mean_step"], "memory": ours["peak_gb"] / other["peak_gb"]}
        for side, other in middle.items()
        if side != "ftcore"
    }
    import torch
    import transformers
    import trl

    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    where = {"cores": os.cpu_count(), "processor": _processor(), **versions}
    summary = {"medians": middle, "ratios": ratios, "agreement": _agreement(found)}
    answer = {"case": case, **summary, "pairs": len(found["ftcore"]), "where": where, "all": found}
    if CASES[case].beside[0] in found:  # others only look
        (HERE / "results" / f"{case}.json").write_text(json.dumps(answer, indent=1) + "\n")
        table.write()
    print(json.dumps(summary, indent=1))


def _agreement(found: Results) -> float | None:
    """Largest relative difference from our first loss, in DPO from the chosen answers' first log-probabilities; None where each
    side samples its own completions."""
    first = found["ftcore"][0]
    if first["length"][0] is not None:
        return None
    key = "chosen" if first["chosen"] is not None else "loss"
    largest: float = max(abs(one[key] / first[key] - 1) for results in found.values() for one in results)
    return largest


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


if __name__ == "__main__":
    main()
