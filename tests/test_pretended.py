"""Whole commands on a pretended CUDA device: no two devices meet, the host seldom waits, nothing is float64."""

import json
import subprocess
from pathlib import Path

import pytest

from ftcore.train import faults
from tests.conftest import FAST, latest
from tests.pretended import Worker, library
from tests.test_methods import CASES

ROOT = Path(__file__).parents[1]
PRECISIONS = ["32-true", "bf16-mixed", "auto"]
ADAPTERS = {"lora": [], "full": [], "freeze": ["adapter.top_layers=1"]}
# Two micro-batches a step, with general text beside each.
WORDS = [
    *FAST,
    "hardware=gpu",
    "evaluate.enabled=false",
    "global_batch_size=8",
    "micro_batch_size=4",
    "retention.every=1",
]
# Host waits of a step: the one for its numbers, and what a method adds. Values of the base model are kept when they are first
# computed, twice or four times a step; z of KTO is one number; an encoder's masks are transformers' own, two in each pass.
WAITS = {"dpo": 3, "ipo": 3, "slic": 3, "kto": 6, "masked": 13}
# Places where the host may wait, or float64 be: completions are read token by token and drawn from float64 sums, cached rows
# are read from files, and peft copies the numbers of control tokens that train at every use.
EXEMPT = (
    "rollout/",
    "methods/online.py",
    "methods/grpo.py",
    "methods/rlhf.py",
    "kernels/frozen_blocks.py",
    "trainable_tokens/",
)


@pytest.fixture(scope="module")
def device(request, tmp_path_factory):
    try:
        built = library(request.config.cache.mkdir("pretended"))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the pretended device needs g++ and torch's headers: {error}")
    worker = Worker(built, tmp_path_factory.mktemp("pretended"))
    yield worker
    worker.close()


def of_ours(places: dict[str, int]) -> dict[str, int]:
    """The places that nothing exempts."""
    return {place: count for place, count in places.items() if not any(name in place for name in EXEMPT)}


def trains(device, case, adapter, precision):
    words = [
        f"adapter={adapter}",
        *ADAPTERS[adapter],
        f"hardware.precision={precision}",
        "max_steps=2",
    ]
    found = device.run(*latest(*WORDS, *CASES[case], *words))
    assert found["status"] == 0 and not found["mixed"], found["log"]
    assert not of_ours(found["doubles"])
    waits = of_ours(found["waits"])
    assert sum(waits.values()) <= WAITS.get(case, 1), waits
    assert found["dtypes"] == {kind: ["torch.float32"] for kind in ("parameters", "gradients", "moments")}


@pytest.mark.parametrize("case", CASES)
def test_every_method_trains_on_a_gpu(device, case):
    trains(device, case, "lora", "auto")


@pytest.mark.parametrize("case", ["sft", "dpo"])
def test_numbers_are_those_of_the_cpu(device, ftcore, case):
    words = [*WORDS, f"method={case}", "hardware.precision=32-true", "max_steps=3", "ledger=true"]
    found, expected = device.run(*latest(*words)), ftcore(*words, "hardware=cpu")
    assert found["loss"] == pytest.approx(expected.metrics[-1]["train/loss"], rel=1e-6)
    assert sum(found["waits"].values()) <= WAITS.get(case, 1) + 1  # one more for the rows' losses


def test_a_run_goes_on_from_its_checkpoint(device):
    """AdamW's fused kernel wants its step counter on the device."""
    words = latest(*WORDS, "method=sft", "max_steps=3", "checkpoints.every=1", "name=stopped", "resume=auto")
    stopped = device.run(*words, **{faults.VARIABLE: "disk_full step=2"})
    assert stopped["status"] == 7, stopped["log"]
    resumed = device.run(*words, **{faults.VARIABLE: ""})
    assert resumed["status"] == 0 and "Going on after step 1" in resumed["log"], resumed["log"]
    assert not resumed["mixed"] and sum(resumed["waits"].values()) == 1, resumed["waits"]


def test_the_benchmark_of_a_gpu_runs(device, tmp_path):
    cases, sides = ["1b_full", "8b_lora", "1b_grpo"], ["ftcore", "loop"]
    words = ["--tiny", "--only", *cases, "--sides", *sides, "--steps", "1", "--results", str(tmp_path / "gpu.json")]
    found = device.run(str(ROOT / "benchmarks" / "gpu.py"), *words)
    assert found["status"] == 0 and not found["mixed"], found["log"]
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert [*figures] == cases and all([*one] == sides for one in figures.values())
    assert all(side["device"] == "pretended" for one in figures.values() for side in one.values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("case", CASES)
def test_every_method_trains_on_a_gpu_with_all_it_may_be_combined_with(device, case, adapter, precision):
    trains(device, case, adapter, precision)
