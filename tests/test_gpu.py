"""On a CUDA device everything is as on the CPU: losses, answers, checkpoints, and memory is given back. `pytest -m gpu`."""

import gc

import pytest
import torch
from safetensors.torch import load_file

from ftcore.kernels.packed_weights import packed_weights
from ftcore.train import faults
from ftcore.train import run as train_run
from tests.conftest import FAST
from tests.test_golden import CASES
from tests.test_golden import WORDS as GOLDEN
from tests.test_lora_linear import layer
from tests.test_losses import CAUSAL, network
from tests.test_rollout import rollouts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"),
]
WORDS = [word for word in GOLDEN if not word.startswith("hardware=")]
GPU = ["hardware=gpu", "hardware.precision=32-true"]
# Another rounding may draw another token, and then another loss.
ONLINE = ("grpo", "rlhf")


def losses(ftcore, *words):
    outcome = ftcore(*words)
    assert outcome.status == 0, outcome.err
    return [line["train/loss"] for line in outcome.metrics]


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    """Stages and scores of one device are not found by the other."""
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_cpu(ftcore, case):
    expected = losses(ftcore, *WORDS, *CASES[case], "hardware=cpu", "name=cpu")
    found = losses(ftcore, *WORDS, *CASES[case], *GPU, "name=gpu")
    assert not torch.backends.cuda.matmul.allow_tf32
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ONLINE])
def test_losses_in_bfloat16_differ_by_its_rounding(ftcore, case, precision):
    """It has 8 bits: 0.4 % of a number."""
    expected = losses(ftcore, *WORDS, *CASES[case], "hardware=cpu", "name=cpu")
    found = losses(ftcore, *WORDS, *CASES[case], "hardware=gpu", f"hardware.precision={precision}", "name=gpu")
    assert found == pytest.approx(expected, rel=2**-7, abs=2**-7)


@pytest.mark.parametrize("case", ONLINE)
def test_methods_that_sample_finish_in_bfloat16(ftcore, case):
    found = losses(ftcore, *WORDS, *CASES[case], "hardware=gpu", "hardware.precision=bf16-mixed")
    assert len(found) == 5 and torch.tensor(found).isfinite().all()


def test_answers_and_scores_are_those_of_the_cpu(ftcore):
    words = ["max_steps=2", "global_batch_size=8", *FAST]
    expected = ftcore(*words, "hardware=cpu", "name=cpu").summary
    found = ftcore(*words, *GPU, "name=gpu").summary
    assert found["base"]["loss"] == pytest.approx(expected["base"]["loss"], rel=1e-5)
    assert found["tuned"]["loss"] == pytest.approx(expected["tuned"]["loss"], rel=1e-5)
    assert [row["base"] for row in found["samples"]] == [row["base"] for row in expected["samples"]]


@pytest.mark.parametrize("family", CAUSAL)
def test_sampled_completions_are_those_of_the_cpu(family):
    model = network(family, sharper=10)
    expected = [one for group in rollouts(model) for one in group]
    found = [one for group in rollouts(model.cuda()) for one in group]
    assert [one.ids for one in found] == [one.ids for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logps == pytest.approx(other.logps, rel=1e-4, abs=1e-4)


def test_merged_updates_give_the_layers_outputs_and_leave_its_weights_to_the_bit():
    net = layer(ours=True).eval().cuda()
    x, before = torch.randn(6, 24, device="cuda"), {name: value.clone() for name, value in net.state_dict().items()}
    expected = net(x).detach()
    with packed_weights(net):
        torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_a_run_that_stopped_goes_on_to_the_same_weights(ftcore, method, monkeypatch):
    words = [*WORDS, *CASES[method], *GPU, "checkpoints.every=2"]
    whole = ftcore(*words, "name=whole")
    monkeypatch.setenv(faults.VARIABLE, "raise process=0 step=4")
    with pytest.raises(RuntimeError, match="asked for"):
        ftcore(*words, "name=stopped")
    monkeypatch.delenv(faults.VARIABLE)
    resumed = ftcore(*words, "name=stopped", "resume=auto")
    assert [line["step"] for line in resumed.metrics] == [1, 2, 3, 4, 5]
    for left, right in zip(*(_weights(one) for one in (whole, resumed)), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_memory_of_a_run_that_failed_is_free_when_the_next_begins(ftcore, monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "out_of_memory step=2")
    allocated, prepare = [], train_run.prepare

    def noted(*arguments):
        allocated.append(torch.cuda.memory_allocated())
        return prepare(*arguments)

    monkeypatch.setattr(train_run, "prepare", noted)
    gc.collect()
    outcome = ftcore(*WORDS, "method=sft", *GPU)
    assert outcome.status == 0, outcome.err
    _, *later = allocated  # the libraries' own buffers come with the first run; the model has 0.8 MB
    assert len(later) == 3 and max(later) - min(later) < 2**18


def _weights(outcome):
    (file,) = outcome.folder.glob("model/*.safetensors")
    return [value for _, value in sorted(load_file(file).items())]
