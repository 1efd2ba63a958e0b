"""Sampled completions have the policy's own log-probabilities and frequencies, whatever else is in the batch."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from ftcore.data.examples import Example
from ftcore.data.layouts import pad
from ftcore.models.logprobs import completion_logps
from ftcore.rollout import sample as module
from ftcore.rollout.cache import RoomyLayer
from ftcore.rollout.sample import sample
from tests.test_losses import CAUSAL, network

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]  # the first is longer than gemma3's sliding window
SEEDS = [3, 1, 2]
# A fifth of the vocabulary ends a completion, so that rows finish at different times.
ENDS = list(range(78, 97))


def rollouts(model, prompts=PROMPTS, seeds=SEEDS, **changes):
    settings = {"group_size": 3, "max_new_tokens": 12, "temperature": 0.7, "top_p": 1.0, "end_ids": ENDS, "pad_id": 0}
    return sample(model, prompts, seeds, **(settings | changes))


def examples(prompts, groups):
    """Each prompt with each of its completions, loss on the completion."""
    pairs = [(prompt, completion.ids) for prompt, group in zip(prompts, groups, strict=True) for completion in group]
    return [Example("", prompt + ids, [False] * len(prompt) + [True] * len(ids)) for prompt, ids in pairs]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("family", CAUSAL)
def test_kept_log_probabilities_are_those_of_a_training_forward(family, temperature):
    model = network(family, sharper=10)
    groups = rollouts(model, temperature=temperature)
    assert len({len(completion.ids) for group in groups for completion in group}) > 3  # they end at different times
    kept = torch.tensor([logp for group in groups for completion in group for logp in completion.logps])
    trained = completion_logps(model.train(), pad(examples(PROMPTS, groups), 0), temperature)
    torch.testing.assert_close(kept, trained.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_p", [1.0, 0.5])
@pytest.mark.parametrize("family", CAUSAL)
def test_a_prompts_completions_do_not_depend_on_what_shares_its_batch(family, top_p):
    model = network(family, sharper=10)
    together = [[c.ids for c in group] for group in rollouts(model, top_p=top_p)]
    for k, prompt in enumerate(PROMPTS):
        (alone,) = rollouts(model, [prompt], [SEEDS[k]], top_p=top_p)
        assert [c.ids for c in alone] == together[k]
    (other,) = rollouts(model, PROMPTS[:1], [SEEDS[0] + 100], top_p=top_p)
    assert [c.ids for c in other] != together[0]  # another seed draws others
    assert len({tuple(ids) for ids in together[0]}) > 1  # and so does every completion of a group


def test_a_completion_stops_at_an_end_token_which_it_keeps_or_at_its_longest_length():
    completions = [c for group in rollouts(network("llama3"), max_new_tokens=4, group_size=8) for c in group]
    for completion in completions:
        assert completion.finished == (completion.ids[-1] in ENDS)
        assert not set(completion.ids[:-1]) & set(ENDS)
        assert len(completion.ids) == 4 if not completion.finished else len(completion.ids) <= 4
        assert len(completion.ids) == len(completion.logps)
    assert {completion.finished for completion in completions} == {True, False}
    endless = [c for group in rollouts(network("llama3"), end_ids=[], max_new_tokens=5) for c in group]
    assert all(len(c.ids) == 5 and not c.finished for c in endless)


def test_a_cold_temperature_draws_the_likeliest_tokens():
    model = network("llama3", sharper=10)
    groups = rollouts(model, temperature=1e-4, end_ids=[], max_new_tokens=6)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert all(completion.ids == ids[len(prompt) :] for completion in group)


# The distribution drawn from: the policy's at the temperature, or the smallest set of likeliest tokens with a share top_p.


def first_tokens(temperature, top_p, number=8000):
    """Probabilities (V,) of the token after a prompt, and many draws of it."""
    model = network("llama3", sharper=10)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    changes = {"group_size": number, "max_new_tokens": 1, "temperature": temperature, "top_p": top_p}
    (group,) = rollouts(model, PROMPTS[:1], [7], **changes)
    return (logits / temperature).softmax(-1).numpy(), group


def nucleus(probabilities, top_p):
    """Token ids of the smallest set of likeliest tokens whose probabilities add up to top_p."""
    order = np.argsort(-probabilities)
    size = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    return order[:size]


@pytest.mark.parametrize("temperature", [0.8, 1.5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_p):
    probabilities, group = first_tokens(temperature, top_p)
    kept = nucleus(probabilities, top_p) if top_p < 1 else np.arange(97)
    drawn = np.bincount([completion.ids[0] for completion in group], minlength=97)
    assert len(kept) > 1 and drawn[kept].sum() == len(group)
    shares = probabilities[kept] / probabilities[kept].sum()
    assert misfit(drawn[kept], shares) < 4
    flatter = shares**0.7  # the bound tells the distribution from one that is a little flatter
    assert misfit(drawn[kept], flatter / flatter.sum()) > 8


def misfit(drawn, shares):
    """Standard deviations by which the chi-square statistic lies above its mean; rare tokens count as one."""
    expected = drawn.sum() * shares
    common = expected > 5
    seen, wanted = ([*values[common], values[~common].sum()] for values in (drawn, expected))
    freedom = len(seen) - 1
    statistic = sum((d - e) ** 2 / max(e, 1) for d, e in zip(seen, wanted, strict=True))
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("top_p", [0.9, 0.5, 1e-6])
def test_log_probabilities_of_drawn_tokens_are_the_policys_whatever_top_p(top_p):
    probabilities, group = first_tokens(1.0, top_p, number=200)
    for completion in group:
        assert completion.logps[0] == pytest.approx(np.log(probabilities[completion.ids[0]]), abs=1e-5)
    if top_p == 1e-6:  # one token is left: greedy
        assert {completion.ids[0] for completion in group} == {int(probabilities.argmax())}


@pytest.mark.parametrize("family", CAUSAL)
def test_a_cache_with_room_changes_no_digit(family, monkeypatch):
    model = network(family, sharper=10)
    found = rollouts(model)
    monkeypatch.setattr(module, "roomy_cache", lambda config, room: DynamicCache(config=config.get_text_config()))
    for group, expected in zip(found, rollouts(model), strict=True):
        for one, other in zip(group, expected, strict=True):
            assert one.ids == other.ids and one.logps.tolist() == other.logps.tolist()


def test_a_new_token_copies_no_earlier_one_until_rows_leave():
    layer = RoomyLayer(room=3)
    states = torch.randn(2, 1, 4, 8).split([2, 1, 1], dim=2)  # a prompt of two tokens, then two tokens
    layer.update(states[0], -states[0])
    first, _ = layer.update(states[1], -states[1])
    keys, values = layer.update(states[2], -states[2])
    assert keys.data_ptr() == first.data_ptr() and layer.get_seq_length() == 4
    assert torch.equal(keys, torch.cat(states, dim=2)) and torch.equal(values, -keys)
    layer.batch_select_indices(torch.tensor([1]))
    later, _ = layer.update(states[2][1:], states[2][1:])
    assert torch.equal(later, torch.cat([*states, states[2]], dim=2)[1:]) and later.data_ptr() != first.data_ptr()
