"""Log-probabilities a chunk at a time: values and gradients are those of the plain computation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from ftcore.data.examples import Example
from ftcore.data.layouts import pad
from ftcore.kernels import projection
from ftcore.kernels.projection import projects_alone, target_logps
from ftcore.models import sharding
from ftcore.models.logprobs import inputs, predicted, token_outputs
from ftcore.models.sharding import full_tensor, shard
from tests.test_attention import Largest

ROOT = Path(__file__).parents[1]
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "layer_types": None,
}  # fmt: skip
ROWS = [Example(str(k), list(range(5, 25 + k)), [False] * 3 + [True] * (17 + k)) for k in range(4)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(projection, "CHUNK", 7)


def plain(hidden, weight, targets, temperature):
    logps = (hidden @ weight.T / temperature).log_softmax(-1)
    return logps.gather(-1, targets[:, None])[:, 0], torch.special.entr(logps.exp()).sum(-1)


@pytest.mark.parametrize("count", [0, 1, 20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trained", [False, True])
def test_values_entropies_and_gradients_are_those_of_plain_autograd(count, temperature, trained):
    torch.manual_seed(0)
    targets, slope = torch.randint(0, 300, (count,)), torch.randn(count)
    given = [(torch.randn(count, 32), torch.randn(300, 32)) for _ in range(1)] * 2
    sides = []
    for (h, w), scores in zip(given, (plain, lambda *a: target_logps(*a, True)), strict=True):
        hidden, weight = h.clone().requires_grad_(), w.clone().requires_grad_(trained)
        logps, entropies = scores(hidden, weight, targets, temperature)
        (logps * slope).sum().backward()
        sides.append((logps.detach(), entropies.detach(), hidden.grad, weight.grad))
    for expected, got in zip(*sides, strict=True):
        if expected is not None or got is not None:
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_under_bf16_autocast_float32_weights_multiply(trained):
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 32, requires_grad=True), torch.randn(300, 32, requires_grad=trained)
    targets = torch.randint(0, 300, (20,))
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = target_logps(hidden.bfloat16(), weight, targets, 1.0, False)
        logps.sum().backward()
    torch.testing.assert_close(logps.float(), plain(hidden, weight, targets, 1.0)[0], atol=0.1, rtol=0.1)
    assert hidden.grad.isfinite().all() and (weight.grad is not None) == trained


def test_the_same_on_a_processor_without_bf16():
    plain = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    test = f"{__file__}::test_under_bf16_autocast_float32_weights_multiply"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, env=os.environ | plain, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


def test_without_gradient_none_is_computed():
    with torch.no_grad():
        logps, entropies = target_logps(torch.randn(9, 32), torch.randn(300, 32), torch.arange(9), 1.0, False)
    assert not logps.requires_grad and len(entropies) == 0


def network(kind, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | changes)).eval()


@pytest.mark.parametrize(
    ("kind", "changes", "alone"),
    [
        ("llama", {}, True),
        ("llama", {"tie_word_embeddings": True}, True),
        ("qwen3", {}, True),
        ("gemma2", {}, False),  # caps the logits
        ("granite", {"logits_scaling": 8.0}, False),
        ("cohere", {"logit_scale": 0.0625}, False),
        ("phi", {}, False),  # bias
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_whatever_an_architecture_does_to_its_logits_stays(kind, changes, alone, frozen):
    model, batch = network(kind, **changes).requires_grad_(not frozen), pad(ROWS, 0)
    assert projects_alone(model) == alone
    for layer in model.model.layers:
        layer.requires_grad_(True)
    positions, targets = predicted(batch)
    expected = model(**inputs(model, batch), use_cache=False).logits[positions].float().log_softmax(-1)
    expected = expected.gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(token_outputs(model, batch).logps, expected, atol=1e-5, rtol=1e-5)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(expected.sum(), parameters, allow_unused=True)
    ours = torch.autograd.grad(token_outputs(model, batch).logps.sum(), parameters, allow_unused=True)
    for name, one, other in zip(names, plain, ours, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)


@pytest.fixture
def mesh(tmp_path):
    """One process that shards as several would."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_of_all_tokens_exist_nowhere_and_never_in_shares(mesh, frozen, monkeypatch):
    monkeypatch.setattr(sharding, "_mesh", mesh)
    batch, found = pad(ROWS * 2, 0), []
    for in_shares in (False, True):
        model = network("llama")
        model.lm_head.requires_grad_(not frozen)
        if in_shares:
            shard([model], torch.device("cpu"), in_bfloat16=False)
        assert projects_alone(model)
        with Largest() as largest:
            logps = token_outputs(model, batch).logps
            logps.sum().backward()
        assert largest.elements < len(logps) * 300
        found.append((logps.detach(), [full_tensor(p.grad) for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_half_precision_and_autocast_agree_with_plain_logits():
    model, batch = network("llama").requires_grad_(False), pad(ROWS, 0)
    positions, targets = predicted(batch)
    for half, cast in ((model, True), (model.to(torch.bfloat16), False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast), torch.no_grad():
            logits = half(**inputs(half, batch), use_cache=False).logits[positions].float()
            expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            torch.testing.assert_close(token_outputs(half, batch).logps, expected, atol=1e-4, rtol=1e-4)
