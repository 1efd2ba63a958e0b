"""adapter=freeze: frozen blocks compute a row once, and nothing changes by it."""

import pytest
import torch

from ftcore.data.examples import Example
from ftcore.data.layouts import pad
from ftcore.kernels.frozen_blocks import ActivationCache, cache_activations
from ftcore.models.adapters import transformer_blocks
from ftcore.models.logprobs import completion_logps
from tests.conftest import FAST
from tests.test_losses import network

WORDS = [*FAST, "adapter=freeze", "adapter.top_layers=1", "retention.weight=0", "hardware=cpu", "global_batch_size=8"]
ROWS = [Example(str(k), list(range(5, 11 + k)), [False] * 2 + [True] * (4 + k)) for k in range(4)]
KINDS = ["llama3", "gpt2", "gemma3", "qwen3"]


def losses(outcome):
    return [line["train/loss"] for line in outcome.metrics if "train/loss" in line]


@pytest.mark.parametrize("method", ["sft", "dpo", "reward"])
def test_a_run_is_the_one_without_them_and_the_second_is_equal_to_the_bit(ftcore, tmp_path, monkeypatch, method):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path / "home"))
    words = [
        f"method={method}",
        *WORDS,
        "max_steps=46",
        "max_epochs=null",
        "data.test_share=0.5",
        "evaluate.max_rows=4",
    ]
    plain = losses(ftcore(*words, "adapter.keep_activations_gb=0"))
    assert not (tmp_path / "home" / "activations").exists()
    cached = losses(ftcore(*words))
    assert cached == pytest.approx(plain, abs=1e-6)
    files = list((tmp_path / "home" / "activations").rglob("*.safetensors"))
    assert len(files) > 100
    assert losses(ftcore(*words)) == cached
    assert sorted(files) == sorted((tmp_path / "home" / "activations").rglob("*.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_known_rows_go_past_the_frozen_blocks_of_any_architecture(kind, tmp_path):
    model = network(kind).requires_grad_(False).eval()
    batch = pad(ROWS, 0)
    expected, calls = completion_logps(model, batch), []
    blocks = list(transformer_blocks(model))[:1]
    attention = getattr(blocks[0], "self_attn", None) or blocks[0].attn
    attention.register_forward_hook(lambda *_: calls.append(1))
    assert cache_activations(model, blocks, ActivationCache(tmp_path, 1e9))
    for _ in range(3):
        assert torch.equal(completion_logps(model, batch), expected)
    assert len(calls) == 1
    fewer = pad(ROWS[:2], 0)  # other padding
    torch.testing.assert_close(
        completion_logps(model, fewer), expected[: sum(map(sum, (r.completion_mask for r in ROWS[:2])))]
    )
    assert len(calls) == 1
    new = [Example("new", [9, 8, 7], [False, True, True]), ROWS[0]]
    completion_logps(model, pad(new, 0))
    assert len(calls) == 2


def test_a_damaged_file_and_a_full_folder_are_computed_again(tmp_path):
    cached, states = ActivationCache(tmp_path, 1000), torch.randn(10, 16)
    cached.put("aa1", states)
    assert torch.equal(cached.get("aa1"), states)
    cached.put("aa2", states)  # 640 bytes each
    assert cached.get("aa2") is None
    assert ActivationCache(tmp_path, 1000).room < 360
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    assert cached.get("aa1") is None


def test_with_dropout_or_a_trained_embedding_nothing_is_cached(tmp_path):
    model = network("gpt2").requires_grad_(False)
    blocks = list(transformer_blocks(model))[:1]
    model.get_input_embeddings().requires_grad_(True)
    assert not cache_activations(model, blocks, ActivationCache(tmp_path, 1e9))
    model.requires_grad_(False).transformer.drop.p = 0.1
    assert not cache_activations(model, blocks, ActivationCache(tmp_path, 1e9))
