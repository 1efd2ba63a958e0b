"""ftcore on one GPU at real shapes, beside a plain PyTorch loop and TRL: tokens a second, share of the card's peak, peak memory.

    python benchmarks/gpu.py [--only 1b_full 8b_lora] [--sides ftcore loop] [--steps 8] [--results FILE] [--tiny]

Nothing is downloaded: weights are random, the tokenizer is that of model=tiny, rows are its words. Every measurement is a process
of its own; all of them take less than nine minutes on a card of 80 GB. 8b_qlora needs bitsandbytes, the side `trl` needs TRL, and
takes Liger's kernels where they are installed. The first step is left out. `--tiny` runs the same code at tiny shapes, in this
process, on whatever device there is. Results: benchmarks/results/gpu.json and a table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_sides
from gpu_sides import CASES, TINY, Case

HERE = Path(__file__).parent
SIDES = ["ftcore", "loop", "trl"]
# Seconds for everything; what does not fit is left out, and said.
BUDGET = 530
# Dense bfloat16 TFLOP/s with float32 accumulation, by a part of the name that torch gives the card. Source: NVIDIA's data
# sheets of DGX B200, H200, H100 (SXM; PCIe), A100, L40S and L4, whose figures with sparsity are halved; the Ada whitepaper.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "L4": 121.0,
}


def main(words: list[str] | None = None) -> None:
    """Measure each side of each case, write the figures and print them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--results", type=Path, help="results/gpu.json, with --tiny gpu.json in this folder")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--measure", nargs=3, help="case, side and folder: this measurement alone, in this process")
    asked = parser.parse_args(words)
    if asked.measure:
        case, side, folder = asked.measure
        print("RESULT " + json.dumps(gpu_sides.measured(CASES[case], side, Path(folder), asked.steps)))
        return
    results = asked.results or (Path("gpu.json") if asked.tiny else HERE / "results" / "gpu.json")
    ends, found = time.monotonic() + BUDGET, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.only:
            case = TINY[name] if asked.tiny else CASES[name]
            if case.adapter == "qlora" and not find_spec("bitsandbytes"):
                print(f"{name}: left out, bitsandbytes is not installed")
                continue
            made = gpu_sides.prepare(case, Path(folder, name))
            for side in filter(asked.sides.__contains__, sides(case)):
                left = ends - time.monotonic()
                one = (
                    gpu_sides.measured(case, side, made, asked.steps)
                    if asked.tiny
                    else in_process(name, side, made, asked.steps, left)
                )
                found.setdefault(name, {})[side] = with_rates(one, case)
                print(f"{name} {side}: {found[name][side]}", flush=True)
                results.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def sides(case: Case) -> list[str]:
    """What is measured: TRL only on rows, since its sampling needs settings of its own."""
    return SIDES if find_spec("trl") and not case.completion else SIDES[:2]


def in_process(case: str, side: str, folder: Path, steps: int, seconds: float) -> dict[str, Any]:
    """A measurement in a process of its own, so that no side finds another's memory; what failed says why."""
    if seconds < 20:
        return {"failed": "no time was left"}
    command = [sys.executable, __file__, "--measure", case, side, str(folder), "--steps", str(steps)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": "no time was left"}
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[0]) if lines else {"failed": done.stderr.strip()[-300:] or f"exit code {done.returncode}"}


def with_rates(one: dict[str, Any], case: Case) -> dict[str, Any]:
    """A result with tokens a second and the share of the card's peak that the arithmetic of the model takes."""
    if "failed" in one:
        return one
    speed = one["tokens"] / one["seconds"]
    peak = next((tera for name, tera in PEAKS.items() if name in one["device"]), None)
    used = round(speed * flops_per_token(case) / (1e12 * peak), 3) if peak else None
    return {**one, "tokens_per_second": round(speed, 1), "flop_utilisation": used}


def flops_per_token(case: Case) -> float:
    """Floating-point operations for each token with loss, without what is computed twice.

    2N forward, 2N for the gradient of inputs and 2N for that of the weights that train, N the parameters of linear layers and
    head; attention, of which the mask leaves half, 6 x layers x width x length. A sampled token takes a forward pass more.
    """
    n, config = gpu_sides.linear_parameters(case), case.shape
    width = config["num_attention_heads"] * config["head_dim"]
    attention = 6 * config["num_hidden_layers"] * width * (case.tokens + case.completion)
    passes = (6 if case.adapter == "full" else 4) + (2 if case.completion else 0)
    return passes * n + attention * (4 / 3 if case.completion else 1)


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Rows of a Markdown table."""
    lines = ["| work | side | tokens/s | share of peak | peak GB | device |", "|---|---|---|---|---|---|"]
    for case, results in found.items():
        for side, one in results.items():
            if "failed" in one:
                lines.append(f"| {case} | {side} | {one['failed'].splitlines()[-1]} | | | |")
            else:
                used = f"{one['flop_utilisation']:.1%}" if one["flop_utilisation"] else "unknown"
                figures = f"{one['tokens_per_second']:,.0f} | {used} | {one['peak_gb']:.1f} | {one['device']}"
                lines.append(f"| {case} | {side} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
