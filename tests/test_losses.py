"""Identities of the losses, and logits at chosen positions equal to the model's own on every architecture family."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

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

from ftcore.data.examples import Example, Pair
from ftcore.data.layouts import pad
from ftcore.data.transforms import mismatched
from ftcore.errors import ModelError
from ftcore.methods.cpo import CPO
from ftcore.methods.dpo import DPO
from ftcore.methods.ipo import IPO
from ftcore.methods.kto import KTO, Labelled
from ftcore.methods.losses import bradley_terry, log_odds, token_kl
from ftcore.methods.orpo import ORPO
from ftcore.methods.preference import Answers
from ftcore.methods.sft import SFT
from ftcore.methods.simpo import SimPO
from ftcore.methods.terms import Averages, Term
from ftcore.models.adapters import freeze, full, lora, transformer_blocks
from ftcore.models.foundation import Foundation
from ftcore.models.logprobs import completion_logps, logits_at, sequence_sums

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


CAUSAL = [family for family in FAMILIES if family != "modernbert"]


def network(family, sharper=1.0):
    """Random weights. `sharper` scales the matrices: with 1 attention is flat and all tokens are about as likely."""
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if family == "modernbert" else AutoModelForCausalLM
    model = auto.from_config(FAMILIES[family]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(sharper if parameter.ndim > 1 else 1)
    return model


def adapted(family, **changes):
    return lora(Foundation(network(family), None), **LORA | changes).network


def test_uniform_logits_cost_log_of_the_vocabulary_per_token():
    logps = completion_logps(network("llama3", sharper=0), pad(ROWS, 0))
    assert logps.tolist() == pytest.approx([-math.log(97)] * 5, rel=1e-6)


def test_no_token_with_loss_gives_zero_and_no_nan():
    model = network("llama3")
    loss = -completion_logps(model, pad([], 0)).sum()
    loss.backward()
    assert loss.item() == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_kl_is_zero_for_equal_distributions_and_right_by_hand():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert token_kl(logits, logits).item() == pytest.approx(0, abs=1e-6)
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert token_kl(p.log(), q.log()).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("build", [network, adapted])
def test_logits_at_positions_are_the_models_own(family, build):
    model = build(family)
    batch = pad(ROWS, 0)
    positions = tuple(batch["trained"])
    with torch.no_grad():
        whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        assert torch.equal(logits_at(model, batch, positions), whole[positions].float())


@pytest.mark.parametrize("family", CAUSAL)
def test_loss_and_gradients_equal_cross_entropy_over_all_positions(family):
    batch, model, reference = pad(ROWS, 0), network(family), network(family)
    (-completion_logps(model, batch)).sum().backward()
    labels = torch.full_like(batch["input_ids"], -100).index_put(
        tuple(batch["trained"]), batch["input_ids"][tuple(batch["trained"])]
    )
    logits = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


# Preference methods: at known points, and by hand from each answer's own log-probabilities.

SHARED = {
    "lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999), "schedule": "constant", "warmup": 0.0, "final_lr": 0.0,
    "max_grad_norm": 1.0,
}  # fmt: skip
PAIRS = [
    Pair(
        "a",
        Example("a", [5, 6, 7, 8, 9], [False, False, True, True, True]),
        Example("a", [5, 6, 11, 12], [False, False, True, True]),
    ),
    Pair("b", Example("b", [13, 14], [False, True]), Example("b", [13, *range(20, 28)], [False] + [True] * 8)),
]
LABELLED = [
    Labelled(e.id, e.input_ids, e.completion_mask, good=k % 2 == 0)
    for p in PAIRS
    for k, e in enumerate((p.chosen, p.rejected))
]


class Hand(NamedTuple):
    """An answer's log-probability under the policy and the base model, and its number of tokens."""

    policy: float
    base: float
    tokens: int


def logp(model, example):
    """Log-probability of an answer from the model's own logits of its row alone."""
    with torch.no_grad():
        logps = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1).double()
    following = zip(example.input_ids[1:], example.completion_mask[1:], strict=True)
    return sum(logps[k, token].item() for k, (token, loss) in enumerate(following) if loss)


def trained(kind, adapt=full, distance=0.05, seed=1, **own):
    """A method whose trained weights moved away from the base model's, and the base model."""
    foundation = Foundation(network("llama3", sharper=5), SimpleNamespace(pad_token_id=0))
    foundation = adapt(foundation)
    method = kind(foundation, SimpleNamespace(max_length=None), **own, **SHARED)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.trained_parameters():
            parameter.add_(distance * torch.randn(parameter.shape, generator=generator))
    return method, network("llama3", sharper=5)


def hands(method, base, examples):
    return [Hand(logp(method.network, e), logp(base, e), sum(e.completion_mask[1:])) for e in examples]


def value(terms):
    """The loss: each term's weighted average."""
    return sum(term.weight * term.total / term.size for term in terms.values() if term.weight)


def with_lora(foundation):
    return lora(foundation, **LORA)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def dpo_by_hand(chosen, rejected):
    margin = 0.3 * ((chosen.policy - chosen.base) - (rejected.policy - rejected.base))
    return -0.9 * log_sigmoid(margin) - 0.1 * log_sigmoid(-margin)


def ipo_by_hand(chosen, rejected):
    better, worse = ((side.policy - side.base) / side.tokens for side in (chosen, rejected))
    return (better - worse - 1 / (2 * 0.3)) ** 2


def simpo_by_hand(chosen, rejected):
    return -log_sigmoid(2.0 * chosen.policy / chosen.tokens - 2.0 * rejected.policy / rejected.tokens - 0.5)


def cpo_by_hand(chosen, rejected):
    margin = 0.3 * (chosen.policy - rejected.policy)
    return -0.9 * log_sigmoid(margin) - 0.1 * log_sigmoid(-margin)


def orpo_by_hand(chosen, rejected):
    better, worse = (math.exp(side.policy / side.tokens) for side in (chosen, rejected))
    return -0.3 * log_sigmoid(math.log(better / (1 - better)) - math.log(worse / (1 - worse)))


# Name -> class, its own parameters, its loss of a pair, and the weight of the chosen answers' likelihood per token.
PREFERENCE = {
    "dpo": (DPO, {"beta": 0.3, "label_smoothing": 0.1}, dpo_by_hand, 0.0),
    "ipo": (IPO, {"beta": 0.3}, ipo_by_hand, 0.0),
    "simpo": (SimPO, {"beta": 2.0, "gamma": 0.5}, simpo_by_hand, 0.0),
    "cpo": (CPO, {"beta": 0.3, "label_smoothing": 0.1, "nll_weight": 0.7}, cpo_by_hand, 0.7),
    "orpo": (ORPO, {"beta": 0.3}, orpo_by_hand, 1.0),
}


@pytest.mark.parametrize("adapt", [full, with_lora])
@pytest.mark.parametrize("name", PREFERENCE)
def test_a_preference_loss_is_what_its_formula_gives_by_hand(name, adapt):
    kind, own, by_hand, nll_weight = PREFERENCE[name]
    method, base = trained(kind, adapt, **own)
    chosen, rejected = (hands(method, base, [getattr(pair, side) for pair in PAIRS]) for side in ("chosen", "rejected"))
    nll = -sum(side.policy for side in chosen) / sum(side.tokens for side in chosen)
    expected = sum(map(by_hand, chosen, rejected)) / len(PAIRS) + nll_weight * nll
    terms = method.loss(method.collate(PAIRS))
    assert value(terms).item() == pytest.approx(expected, rel=1e-5)
    assert terms["logps/chosen"].total.item() == pytest.approx(sum(side.policy for side in chosen), rel=1e-5)
    better, worse = (method.reward(Answers(*torch.tensor(side).T)) for side in (chosen, rejected))
    assert terms["rewards/margins"].total.item() == pytest.approx((better - worse).sum().item(), rel=1e-4)
    assert terms["rewards/accuracies"].total.item() == (better > worse).sum()


@pytest.mark.parametrize("adapt", [full, with_lora])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_at_the_base_model_is_log_2_and_pushes_the_answers_apart_by_half_beta(adapt, smoothing):
    method, _ = trained(DPO, adapt, distance=0, beta=0.3, label_smoothing=smoothing)
    batch = method.collate(PAIRS)
    terms = method.loss(batch)
    assert value(terms).item() == pytest.approx(math.log(2), rel=1e-6)
    assert all(terms[f"rewards/{name}"].total.item() == 0 for name in ("chosen", "rejected", "margins"))
    terms["pairs"].total.backward()
    gradients = [parameter.grad.clone() for parameter in method.trained_parameters()]
    method.zero_grad()
    chosen, rejected = sequence_sums(method.network, batch).split(len(PAIRS))
    (0.3 / 2 * (1 - 2 * smoothing) * (rejected - chosen).sum()).backward()
    for ours, theirs in zip(gradients, method.trained_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-6)


def test_ipo_at_its_goal_costs_nothing_and_pulls_nowhere():
    method, base = trained(IPO, beta=1.0)
    pair = PAIRS[0]
    sides = hands(method, base, [pair.chosen, pair.rejected])
    better, worse = ((side.policy - side.base) / side.tokens for side in sides)
    assert better > worse + 0.01
    method.beta = 1 / (2 * (better - worse))
    loss = value(method.loss(method.collate([pair])))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-9)
    assert max(parameter.grad.abs().max().item() for parameter in method.trained_parameters()) < 1e-3
    method.beta /= 2  # a goal twice as far
    assert value(method.loss(method.collate([pair]))).item() == pytest.approx((better - worse) ** 2, rel=1e-4)


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo"])
def test_two_equal_answers_cost_what_an_undecided_pair_costs(name):
    kind, own, _, nll_weight = PREFERENCE[name]
    method, base = trained(kind, **own)
    same = [Pair(pair.id, pair.chosen, pair.chosen) for pair in PAIRS]
    pairs = {"simpo": -log_sigmoid(-0.5), "cpo": math.log(2), "orpo": 0.3 * math.log(2)}[name]
    chosen = hands(method, base, [pair.chosen for pair in same])
    nll = -sum(side.policy for side in chosen) / sum(side.tokens for side in chosen)
    assert value(method.loss(method.collate(same))).item() == pytest.approx(pairs + nll_weight * nll, rel=1e-5)


WEIGHTS = {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.0}


@pytest.mark.parametrize("adapt", [full, with_lora])
def test_kto_at_the_base_model_is_one_half_of_each_rows_weight(adapt):
    method, _ = trained(KTO, adapt, distance=0, **WEIGHTS)
    batch = method.collate(LABELLED)
    assert value(method.loss(batch)).item() == pytest.approx(0.5, abs=1e-6)
    method.desirable_weight, method.undesirable_weight = 1.5, 0.5
    terms = method.loss(batch)
    assert terms["rows"].total.item() == pytest.approx(0.5 * (2 * 1.5 + 2 * 0.5), abs=1e-6)
    assert terms["kl"].total.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("seed", "known"), [(5, None), (1, None), (1, 0.8)], ids=["estimated", "estimated below zero", "known"]
)
def test_kto_is_what_its_formula_gives_by_hand(seed, known):
    method, base = trained(KTO, seed=seed, **WEIGHTS | {"undesirable_weight": 0.4})
    rows = [replace(row, z=known) for row in LABELLED]
    others = hands(method, base, mismatched(rows))
    estimate = sum(hand.policy - hand.base for hand in others) / len(others)
    assert (estimate > 0.1) == (seed == 5)
    z = max(estimate, 0) if known is None else known
    costs = [
        1 - 1 / (1 + math.exp(-0.3 * (hand.policy - hand.base - z)))
        if row.good
        else 0.4 * (1 - 1 / (1 + math.exp(-0.3 * (z - hand.policy + hand.base))))
        for row, hand in zip(rows, hands(method, base, rows), strict=True)
    ]
    terms = method.loss(method.collate(rows))
    assert value(terms).item() == pytest.approx(sum(costs) / len(costs), rel=1e-5)
    assert terms["kl"].total.item() / len(rows) == pytest.approx(z, rel=1e-4, abs=1e-5)


def test_methods_that_compare_ignore_the_networks_dropout_and_keep_the_adapters():
    torch.manual_seed(0)
    settings = {**FAMILIES["gpt2"].to_diff_dict(), "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    foundation = Foundation(AutoModelForCausalLM.from_config(GPT2Config(**settings)), SimpleNamespace(pad_token_id=0))
    foundation = lora(foundation, **LORA | {"dropout": 0.5})
    DPO(foundation, None, beta=0.3, label_smoothing=0.0, **SHARED)
    on = {name for name, m in foundation.network.named_modules() if isinstance(m, torch.nn.Dropout) and m.p}
    assert on and all("lora_dropout" in name for name in on)


METHODS = {name: (kind, own, PAIRS) for name, (kind, own, *_) in PREFERENCE.items()} | {
    "sft": (SFT, {"packing": False}, ROWS),
    "sft, packed": (SFT, {"packing": True}, ROWS),
    "kto": (KTO, WEIGHTS, [replace(row, z=0.2) for row in LABELLED]),
}


@pytest.mark.parametrize("name", METHODS)
def test_terms_are_sums_over_as_many_as_the_counts_say_and_add_up_over_batches(name):
    kind, own, rows = METHODS[name]
    method, _ = trained(kind, **own)
    whole = method.loss(method.collate(rows))
    counts = Counter()
    for row in rows:
        counts.update(method.counts(row))
    assert {term: counts[whole[term].per] for term in whole} == {term: whole[term].size for term in whole}
    parts = [method.loss(method.collate([row])) for row in rows]
    for term in whole:
        total = sum(part[term].total.item() for part in parts)
        assert whole[term].total.item() == pytest.approx(total, rel=1e-5, abs=1e-5), term


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_without_rows_costs_zero_and_has_zero_gradients(name):
    kind, own, _ = METHODS[name]
    method, _ = trained(kind, **own)
    terms = method.loss(method.collate([]))
    sum(term.weight * term.total for term in terms.values()).backward()
    assert all(term.total.item() == 0 and term.size == 0 for term in terms.values())
    gradients = [parameter.grad for parameter in method.trained_parameters() if parameter.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)


def test_averages_count_every_process_by_its_rows_and_one_without_rows_not_at_all(monkeypatch):
    averages, other = Averages(), {"nll": [1.0, 1, 1.0], "kl": [0.5, 1, 0.0]}
    averages.add({"nll": Term(torch.tensor(6.0), 2, "tokens"), "kl": Term(torch.tensor(0.0), 1, "rows", 0.0)})
    averages.add({"nll": Term(torch.tensor(3.0), 2, "tokens"), "kl": Term(torch.tensor(1.5), 3, "rows", 0.0)})
    assert averages.over_processes() == {"loss": 2.25, "nll": 2.25, "kl": 0.375}
    monkeypatch.setattr("ftcore.methods.terms.gathered", lambda part: [{}, part, other])
    assert averages.over_processes() == {"loss": 2.0, "nll": 2.0, "kl": 0.4}
    assert Averages().over_processes() == {"loss": 1.0, "nll": 1.0, "kl": 0.5}
    monkeypatch.setattr("ftcore.methods.terms.gathered", lambda part: [{}, {}])
    assert averages.over_processes() == {}


def test_log_odds_and_the_logistic_loss_by_hand():
    assert log_odds(torch.tensor([0.2, 0.5, 0.9]).log()).tolist() == pytest.approx(
        [math.log(0.25), 0.0, math.log(9)], abs=1e-5
    )
    loss = bradley_terry(torch.tensor([2.0]), torch.tensor([0.5]), margin=0.5, smoothing=0.1)
    assert loss.item() == pytest.approx(0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1)), rel=1e-6)


# Which parameters train.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_an_adapter_trains_little_and_leaves_the_base_as_it_was(family, variant):
    base, model = network(family), adapted(family, **variant)
    batch = pad(ROWS, 0)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(
            logits_at(model, batch, tuple(batch["trained"])), logits_at(base, batch, tuple(batch["trained"]))
        )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_every_entry_of_target_modules_must_match_and_the_counts_are_printed(capsys):
    with pytest.raises(ModelError, match=r"v_prooj match nothing .* q_proj"):
        adapted("llama3", target_modules=["q_proj", "v_prooj"])
    assert "q_proj 2, v_prooj 0" in capsys.readouterr().out
    model = adapted("llama3", target_modules=["q_proj", "v_prooj"], allow_unmatched=True)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2
    with pytest.raises(ModelError, match="match nothing"):
        adapted("llama3", target_modules=["x"], allow_unmatched=True)


def test_freeze_trains_the_top_blocks_alone():
    model = freeze(Foundation(network("llama3"), None), top_layers=1, train_head=False, keep_activations_gb=0).network
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.1.{name}" for name, _ in transformer_blocks(model)[1].named_parameters()}
    with pytest.raises(ModelError, match="2 transformer blocks"):
        freeze(Foundation(network("llama3"), None), top_layers=3, train_head=False, keep_activations_gb=0)


def test_full_trains_everything():
    assert all(p.requires_grad for p in full(Foundation(network("gpt2"), None)).network.parameters())
