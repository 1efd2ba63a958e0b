"""The losses of five steps of every method, as text files in tests/golden. `make golden` writes them anew."""

import os
from pathlib import Path

import pytest

from ftcore.config.options import options

FOLDER = Path(__file__).parent / "golden"
WORDS = ["model=tiny", "logger=none", "hardware=cpu", "evaluate.enabled=false", "max_steps=5", "global_batch_size=8"]
# What makes a method cheap, or its losses more than zeros, on a model of random weights.
MORE = {
    "grpo": [
        "method.rewards=[length]",
        "method.reward_options.length.limit=4",
        "method.advantage=reinforce",
        "method.updates=2",
    ],
    "rlhf": [
        "method.stages.policy=['method=sft','max_steps=1']",
        "method.stages.reward_model=['method=reward','max_steps=1']",
    ],
}
CASES = {name: [f"method={name}", *MORE.get(name, [])] for name in options("method")} | {
    "self_supervised-fill_in_the_middle": ["method=self_supervised", "method.objective=fill_in_the_middle"],
    "self_supervised-masked": ["method=self_supervised", "method.objective=masked", "model=tiny_encoder"],
}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_on_record(case, ftcore, monkeypatch, tmp_path):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path / "home"))
    outcome = ftcore(*WORDS, *CASES[case])
    assert outcome.status == 0, outcome.err
    losses = [line["train/loss"] for line in outcome.metrics]
    file = FOLDER / f"{case}.txt"
    if os.environ.get("FTCORE_RECORD"):
        FOLDER.mkdir(exist_ok=True)
        file.write_text("".join(f"{loss:.6f}\n" for loss in losses))
    # Machines differ in the order of sums: a change of the algorithm shows in the third digit at the latest.
    assert losses == pytest.approx([float(line) for line in file.read_text().split()], rel=2e-4, abs=2e-5)
