"""Identities of the losses, and logits at chosen positions equal to the model's own on every architecture family."""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    Qwen3Config,
)

from ftcore.adapter import freeze, full, lora, transformer_blocks
from ftcore.data.batches import pad
from ftcore.data.tokens import Example
from ftcore.errors import ModelError
from ftcore.logits import completion_logps, logits_at
from ftcore.losses import negative_log_likelihood, token_kl

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
KV = {"num_key_value_heads": 2, "head_dim": 8}
ENDS = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
FAMILIES = {
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, eos_token_id=1, bos_token_id=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "llama3": LlamaConfig(**SMALL, **KV, **ENDS),
    "gemma3": Gemma3TextConfig(**SMALL, **KV, **ENDS, sliding_window=4, final_logit_softcapping=5.0),
    "qwen3": Qwen3Config(**SMALL, **KV, **ENDS, tie_word_embeddings=True),
    "modernbert": ModernBertConfig(
        **SMALL, **ENDS, cls_token_id=3, sep_token_id=4, global_attn_every_n_layers=2, local_attention=8
    ),
}  # fmt: skip
LORA = {
    "rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear", "allow_unmatched": False, "use_dora": False,
    "use_rslora": False, "load_in_4bit": False,
}  # fmt: skip
ROWS = [Example("a", [5, 6, 7, 8, 9], [False, False, True, True, True]), Example("b", [5, 8, 11], [False, True, True])]


def network(family):
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if family == "modernbert" else AutoModelForCausalLM
    return auto.from_config(FAMILIES[family]).eval()


def test_uniform_logits_cost_log_of_the_vocabulary_per_token():
    logps = torch.zeros(7, 97).log_softmax(-1)[:, 0]
    assert negative_log_likelihood(logps).item() == pytest.approx(7 * math.log(97), rel=1e-6)


def test_no_token_with_loss_gives_zero_and_no_nan():
    model = network("llama3")
    loss = negative_log_likelihood(completion_logps(model, pad([], 0)))
    loss.backward()
    assert loss.item() == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_kl_is_zero_for_equal_distributions_and_right_by_hand():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert token_kl(logits, logits).item() == pytest.approx(0, abs=1e-6)
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert token_kl(p.log(), q.log()).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapted", [False, True])
def test_logits_at_positions_are_the_models_own(family, adapted):
    model = lora(network(family), **LORA) if adapted else network(family)
    batch = pad(ROWS, 0)
    positions = batch["completion_mask"]
    with torch.no_grad():
        whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        assert torch.equal(logits_at(model, batch, positions), whole[positions].float())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "modernbert"])
def test_loss_and_gradients_equal_cross_entropy_over_all_positions(family):
    batch, model, reference = pad(ROWS, 0), network(family), network(family)
    negative_log_likelihood(completion_logps(model, batch)).backward()
    labels = batch["input_ids"].masked_fill(~batch["completion_mask"], -100)
    logits = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


# Which parameters train.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_an_adapter_trains_little_and_leaves_the_base_as_it_was(family, variant):
    base, adapted = network(family), lora(network(family), **LORA | variant)
    batch = pad(ROWS, 0)
    with torch.no_grad(), adapted.disable_adapter():
        assert torch.equal(
            logits_at(adapted, batch, batch["completion_mask"]), logits_at(base, batch, batch["completion_mask"])
        )
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_every_entry_of_target_modules_must_match_and_the_counts_are_printed(capsys):
    with pytest.raises(ModelError, match=r"v_prooj match nothing .* q_proj"):
        lora(network("llama3"), **LORA | {"target_modules": ["q_proj", "v_prooj"]})
    assert "q_proj 2, v_prooj 0" in capsys.readouterr().out
    adapted = lora(network("llama3"), **LORA | {"target_modules": ["q_proj", "v_prooj"], "allow_unmatched": True})
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2
    with pytest.raises(ModelError, match="match nothing"):
        lora(network("llama3"), **LORA | {"target_modules": ["x"], "allow_unmatched": True})


def test_freeze_trains_the_top_blocks_alone():
    model = freeze(network("llama3"), top_layers=1, train_head=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.1.{name}" for name, _ in transformer_blocks(model)[1].named_parameters()}
    with pytest.raises(ModelError, match="2 transformer blocks"):
        freeze(network("llama3"), top_layers=3, train_head=False)


def test_full_trains_everything():
    assert all(p.requires_grad for p in full(network("gpt2")).parameters())
