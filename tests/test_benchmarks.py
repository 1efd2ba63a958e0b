"""docs/performance.md quotes what was measured, and the measurement for a GPU runs at tiny shapes on a CPU."""

import json
from pathlib import Path

import pytest

from benchmarks.table import END, START, table

ROOT = Path(__file__).parents[1]


def test_the_table_of_the_page_is_that_of_the_results():
    inside = (ROOT / "docs/performance.md").read_text().split(START)[1].split(END)[0]
    assert inside.strip() == table().strip()
    assert {f"{case}.json" for case in ("sft", "dpo", "grpo", "sweep")} <= {
        file.name for file in (ROOT / "benchmarks/results").iterdir()
    }


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


@pytest.mark.parametrize("case", ["1b_full", "8b_lora", "1b_grpo"])
def test_each_side_is_measured_at_tiny_shapes(gpu, case, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        gpu, "sides", lambda _: ["ftcore", "loop"]
    )  # importing TRL's trainers takes longer than the rest
    gpu.main(["--tiny", "--only", case, "--steps", "1", "--results", "gpu.json"])
    found = json.loads(Path("gpu.json").read_text())[case]
    for side in ("ftcore", "loop"):
        one = found[side]
        assert one["tokens"] in (8 * 8, 8 * 15) and one["tokens_per_second"] > 0 and one["peak_gb"] > 0
    assert f"| {case} | loop |" in capfd.readouterr().out


def test_arithmetic_of_a_token_is_six_for_each_parameter_that_trains_and_four_for_a_frozen_one(gpu):
    """Llama 3.2 1B has 1.236e9 parameters with its head, Llama 3.1 8B 8.03e9 with embeddings (0.525e9) beside the head."""
    full, frozen = (gpu.flops_per_token(gpu.CASES[name]) for name in ("1b_full", "8b_lora"))
    assert full == pytest.approx(6 * 1.236e9 + 6 * 16 * 2048 * 2048, rel=1e-3)
    assert frozen == pytest.approx(4 * (8.03e9 - 0.525e9) + 6 * 32 * 4096 * 2048, rel=1e-3)


def test_a_share_of_the_peak_is_given_where_the_card_is_known(gpu):
    one, case = {"tokens": 1000, "seconds": 1.0}, gpu.CASES["1b_full"]
    card = gpu.with_rates({**one, "device": "NVIDIA H100 80GB HBM3"}, case)["flop_utilisation"]
    assert card == pytest.approx(1000 * gpu.flops_per_token(case) / 989.4e12, abs=1e-3)
    slower = gpu.with_rates({**one, "device": "NVIDIA H100 PCIe"}, case)["flop_utilisation"]
    assert slower > card
    assert gpu.with_rates({**one, "device": "CPU"}, case)["flop_utilisation"] is None


def test_a_measurement_that_fails_says_why(gpu, tmp_path):
    failed = gpu.in_process("1b_full", "unknown", tmp_path, 1, seconds=60)
    assert "KeyError" in failed["failed"] and "KeyError" in gpu.table({"1b_full": {"unknown": failed}})
    assert gpu.in_process("1b_full", "loop", tmp_path, 1, seconds=1) == {"failed": "no time was left"}
