"""profile=true writes a trace and a table whose parts add up to the step."""

import json
import re

import pytest
import torch

from ftcore.kernels.packed_weights import packed_weights
from ftcore.timing import Watch
from ftcore.train.profile import SIDE, _flops, peak
from tests.conftest import FAST


@pytest.mark.parametrize(("method", "more"), [("sft", set()), ("grpo", {"rollout", "reward"})])
def test_parts_add_up_to_the_step_and_the_trace_opens(ftcore, method, more):
    outcome = ftcore(f"method={method}", *FAST, "hardware=cpu", "max_steps=4", "profile=true")
    assert outcome.status == 0, outcome.err
    text = (outcome.folder / "profile.txt").read_text()
    parts = {name: float(value) for name, value in re.findall(r"│ (\w+) +│ +([\d.]+) │", text)}
    assert set(parts) == {"data", "forward", "head", "backward", "optimizer"} | more
    assert sum(parts.values()) == pytest.approx(float(re.search(r"step: ([\d.]+) s", text)[1]), abs=0.01)
    assert re.search(r"GFLOP/s: \d+% of the", text)
    assert json.loads((outcome.folder / "profile.json").read_text())["traceEvents"]


def test_a_run_of_one_step_is_watched_and_computes_the_same(ftcore):
    words = [*FAST, "hardware=cpu", "max_steps=1"]
    watched = ftcore(*words, "profile=true")
    assert (watched.folder / "profile.txt").is_file()
    assert watched.summary["tuned"] == ftcore(*words).summary["tuned"]


def test_matmuls_by_onednn_count_like_torch_s_own():
    layer, x = torch.nn.Linear(24, 40), torch.randn(3, 7, 24)
    with packed_weights(layer):
        for call in (lambda: x @ layer.weight.T, lambda: layer(x)):
            with torch.profiler.profile(with_flops=True, record_shapes=True) as tracer:
                call()
            counted = sum(map(_flops, tracer.key_averages(group_by_input_shape=True)))
            assert counted == 2 * 3 * 7 * 24 * 40


def test_an_inner_part_is_not_the_outers():
    watch = Watch()
    before = watch.switch("rollout")
    assert (before, watch.switch("reward"), watch.switch("rollout"), watch.switch(before)) == (
        "data", "rollout", "reward", "rollout",
    )  # fmt: skip
    assert set(watch.seconds) == {"data", "rollout", "reward"}


def test_the_peak_is_that_of_a_matmul(monkeypatch):
    monkeypatch.setattr("ftcore.train.profile.SIDE", 256)
    assert SIDE == 2048 and peak("32-true") > 1e6 and torch.isfinite(torch.tensor(peak("bf16-mixed")))
