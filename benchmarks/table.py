"""The benchmark table of docs/performance.md: `python benchmarks/table.py` rewrites it, as every measurement does."""

import json
from pathlib import Path

HERE = Path(__file__).parent
START, END = "<!-- benchmarks: made by benchmarks/table.py -->\n", "<!-- end of benchmarks -->\n"
WORK = {
    "sft": "SFT, medquad_sft, 8 rows of up to 512 tokens",
    "precision": "the same with hardware.precision=auto",
    "long": "SFT, 2 rows of 2,048 tokens",
    "dpo": "DPO, hh_helpful_base, 4 pairs of up to 512 tokens",
    "grpo": "GRPO, medmcqa_dev, 2 prompts x 8 completions of up to 64 tokens, KL on",
    "rlhf": "RLHF, medmcqa_dev, 16 completions of up to 64 tokens, one update",
}
SIDES = {
    "trl": "TRL",
    "trl_allocator": "TRL with ftcore's allocator setting",
    "trl_defaults": "TRL with gradient checkpointing, its default",
    "trl_bf16": "TRL in bf16",
    "ftcore_32_true": "ftcore in 32-true",
    "ftcore_bf16_mixed": "ftcore in bf16-mixed",
    "loop": "a plain PyTorch loop",
    "litgpt": "LitGPT",
}


def table(results: Path = HERE / "results") -> str:
    """A row for every side of every case that has been measured."""
    lines = ["| work | ftcore | compared with | | speed ratio | memory ratio |", "|---|---|---|---|---|---|"]
    for case, work in WORK.items():
        if (file := results / f"{case}.json").exists():
            lines += _rows(work, json.loads(file.read_text()))
    if (file := results / "sweep.json").exists():
        for steps, sweep in sorted(json.loads(file.read_text()).items()):
            ours = f"| {sweep['jobs']} runs of {steps} steps of 8 short rows | {sweep['sweep_s']:.0f} s, one sweep |"
            lines += [
                f"{ours} TRL, one after another | {sweep['trl_s']:.0f} s | {sweep['speed']:.2f} | |",
                f"{ours} TRL, one per core | {sweep['trl_together_s']:.0f} s | {sweep['speed_together']:.2f} | |",
            ]
    return "\n".join(lines) + "\n"


def _rows(work: str, result: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    figures = {side: f"{of['mean_step']:.2f} s/step, {of['peak_gb']:.2f} GB" for side, of in result["medians"].items()}
    return [
        f"| {work} | {figures['ftcore']} | {name} | {figures[side]} | {ratio['speed']:.2f} | {ratio['memory']:.2f} |"
        for side, name in SIDES.items()
        if (ratio := result["ratios"].get(side))
    ]


def write(page: Path = HERE.parent / "docs" / "performance.md") -> None:
    """Put the table between its markers."""
    before, rest = page.read_text().split(START)
    page.write_text(before + START + "\n" + table() + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    write()
