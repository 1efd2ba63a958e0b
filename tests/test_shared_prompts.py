"""Answers that follow their prompt side by side get the log-probabilities, losses and gradients that they get alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ftcore.config.build import build
from ftcore.config.compose import load_config
from ftcore.data.examples import Example, Pair
from ftcore.data.layouts import pad, share_prompts
from ftcore.files import PACKAGE
from ftcore.methods.base import Method
from ftcore.models.foundation import TAKE_ANY_MASK, Foundation, takes_any_mask
from ftcore.models.logprobs import completion_logps, row_sums, sequence_scores

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "n_embd": 32, "n_layer": 2, "n_head": 4, "sliding_window": None,
}  # fmt: skip


def network(kind, auto=AutoModelForCausalLM, **changes):
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def examples(seed=0, prompts=3, answers=4, long=False):
    """Answers of different lengths to a few prompts, one prompt of a single token, one answer cut to nothing but its prompt."""
    random, made = np.random.default_rng(seed), []
    for number in range(prompts):
        prompt = random.integers(3, 300, 1 if number == 0 else random.integers(2, 12)).tolist()
        for _ in range(answers):
            answer = random.integers(3, 300, random.integers(1, 90 if long else 9)).tolist()
            made.append(Example(str(number), prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return made


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("kind", sorted(TAKE_ANY_MASK))
def test_answers_get_what_they_get_alone(kind, long):
    model, rows = network(kind), examples(long=long)
    assert takes_any_mask(model)
    shared, alone = share_prompts(rows, 0, width=4096), pad(rows, 0)
    assert len(shared["input_ids"]) == 3
    with torch.no_grad():
        got, expected = (
            row_sums(completion_logps(model, shared), shared),
            row_sums(completion_logps(model, alone), alone),
        )
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_tokens_of_one_answer_do_not_depend_on_the_others():
    model, rows = network("llama"), examples()
    other = [*rows[:3], Example("0", [*rows[0].input_ids[:1], 7, 8, 9, 10], [False] + [True] * 4), *rows[4:]]
    with torch.no_grad():
        before, after = (completion_logps(model, share_prompts(r, 0, 32)) for r in (rows, other))
    first = sum(row.trained for row in rows[:3])
    torch.testing.assert_close(before[:first], after[:first], atol=1e-5, rtol=1e-5)


def test_scores_are_read_at_each_answers_end():
    model, rows = network("llama", AutoModelForSequenceClassification, num_labels=1), examples()
    with torch.no_grad():
        torch.testing.assert_close(
            sequence_scores(model, share_prompts(rows, 0, 32)),
            sequence_scores(model, pad(rows, 0)),
            atol=1e-4,
            rtol=1e-5,
        )


@pytest.mark.parametrize(
    "model",
    [
        network("mistral", sliding_window=8),
        network("gemma3_text"),
        network("llama", attn_implementation="flex_attention"),
    ],
    ids=["window", "windows in some layers", "other kernel"],
)
def test_other_networks_keep_a_row_for_each_answer(model):
    assert not takes_any_mask(model)


def test_long_answers_to_a_short_prompt_are_not_put_into_one_row():
    rows = [Example("a", [5] * 100 + [7] * 400, [False] * 100 + [True] * 400) for _ in range(4)]
    assert share_prompts(rows, 0, width=32)["input_ids"].shape == (4, 500)
    assert share_prompts(rows, 0, width=4096)["input_ids"].shape == (1, 1700)


@pytest.mark.parametrize("name", ["dpo", "ipo", "slic", "orpo", "cpo", "simpo", "reward"])
def test_losses_and_gradients_of_pairs_are_the_same(name, monkeypatch):
    """One step of each method in both layouts."""
    sides = [examples(seed, prompts=3, answers=2) for seed in (1, 2)]
    pairs = [
        Pair(str(k), made[2 * n], made[2 * n + 1], 0.0)
        for k, (made, n) in enumerate((m, n) for m in sides for n in range(3))
    ]
    found = [differentiated(name, pairs, shares, monkeypatch) for shares in (True, False)]
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5, rel=1e-5)
    for key, gradient in found[1][1].items():
        torch.testing.assert_close(
            found[0][1][key], gradient, atol=1e-5 * float(gradient.abs().max() + 1e-3), rtol=1e-4
        )


def differentiated(name, pairs, shares, monkeypatch):
    auto = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "datasets" / "tiny")
    sizes = {"pad_token_id": tokenizer.pad_token_id} | ({"num_labels": 1} if name == "reward" else {})
    model, base = network("llama", auto, **sizes), network("llama", auto, **sizes)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.1)
    foundation = Foundation(model, tokenizer, frozen_copy=base)
    method = build(
        load_config([f"method={name}", "model=tiny"])["method"], Method, foundation, SimpleNamespace(max_length=None)
    )
    monkeypatch.setattr("ftcore.methods.base.takes_any_mask", lambda _: shares)
    terms = method.loss(method.collate(pairs))
    loss = sum(term.weight * term.total / term.size for term in terms.values() if term.weight)
    loss.backward()
    return loss.item(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
