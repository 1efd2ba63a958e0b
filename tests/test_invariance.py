"""One trajectory however a step is split, laid out or spread over processes: losses within 1e-6 in float32 on the CPU.

Weights drift apart by rounding, so each step's loss is compared, and the mean of the differences, which shows a bias.
"""

import pytest
import torch

from ftcore.methods.base import Method
from tests.test_methods import CASES

WORDS = ["model=tiny", "logger=none", "evaluate.enabled=false", "hardware=cpu", "max_steps=8", "global_batch_size=8"]
RETENTION = ["retention.weight=0.5", "retention.rows=2", "retention.every=1"]
# Whole steps in one micro-batch is what the others are compared with. Slow ones: `pytest -m processes`.
SPLITS = {
    "accumulated": ["micro_batch_size=1"],
    "ddp": ["micro_batch_size=2", "hardware=ddp_2cpu"],
    "fsdp": ["micro_batch_size=2", "hardware=fsdp_2cpu"],
    "checkpointing": ["hardware.activation_checkpointing=true"],
    "padding": [],
}
OFTEN = {("sft", "ddp")}


def losses(ftcore, method, *words):
    rate = "1e-2" if method == "sft" else "1e-3"
    outcome = ftcore(*WORDS, *CASES[method], f"method.lr={rate}", "micro_batch_size=8", *RETENTION, *words)
    assert outcome.status == 0, outcome.err
    metrics = outcome.metrics
    assert [line["step"] for line in metrics] == list(range(1, 9))
    return [line["train/loss"] for line in metrics]


def agree(found, expected):
    residuals = [a - b for a, b in zip(found, expected, strict=True)]
    largest = max(map(abs, expected))
    assert max(map(abs, residuals)) < 1e-6 * max(largest, 1), residuals
    assert abs(sum(residuals) / len(residuals)) < 1e-6, residuals


def more_padding(collate):
    """`collate` with seven more columns of padding and a row for each answer."""

    def padded(self, examples, shared_prompts=False):
        batch = collate(self, examples)
        fill = {"input_ids": self.pad_id, "attention_mask": 0}
        return batch | {key: torch.nn.functional.pad(batch[key], (0, 7), value=fill[key]) for key in fill}

    return padded


@pytest.fixture(scope="module")
def whole():
    return {}  # losses of each method's undivided steps


@pytest.mark.parametrize(
    ("method", "split"),
    [
        pytest.param(
            m, s, marks=[pytest.mark.slow, pytest.mark.processes] * (s in ("ddp", "fsdp") and (m, s) not in OFTEN)
        )
        for m in ("sft", "dpo", "orpo", "reward", "grpo")
        for s in SPLITS
    ],
)
def test_a_split_does_not_change_the_losses(ftcore, whole, monkeypatch, method, split):
    if method not in whole:
        whole[method] = losses(ftcore, method)
    if split == "padding":
        monkeypatch.setattr(Method, "collate_text", more_padding(Method.collate_text))
    agree(losses(ftcore, method, *SPLITS[split]), whole[method])


def test_packing_does_not_change_the_losses(ftcore):
    plain = losses(ftcore, "sft")
    assert plain[-1] < plain[0] - 0.05  # it does learn: otherwise equal losses would say nothing
    agree(losses(ftcore, "sft", "method.packing=true"), plain)
    agree(losses(ftcore, "sft", "method.packing=true", "micro_batch_size=2"), plain)


def test_the_same_seed_gives_the_same_run_to_the_bit_and_another_seed_does_not(ftcore):
    first, second = losses(ftcore, "sft"), losses(ftcore, "sft")
    assert first == second != losses(ftcore, "sft", "seed=1")
