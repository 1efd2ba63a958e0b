"""PPO against its papers' equations, computed here a second time with Python floats and loops.

Advantages: Schulman et al. 2016 (arXiv:1506.02438), eq. 16. Policy: Schulman et al. 2017 (arXiv:1707.06347), eq. 7. Rewards:
Ouyang et al. 2022 (arXiv:2203.02155), eq. 2, token by token.
"""

import math
from functools import cache
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ftcore.config.build import build
from ftcore.config.compose import load_config
from ftcore.data.steps import TrainBatches
from ftcore.methods.base import Method, RunContext
from ftcore.methods.losses import clipped_policy_loss, clipped_value_loss, generalized_advantages, moments, whitened
from ftcore.methods.rlhf import RLHF
from ftcore.models.foundation import Foundation
from ftcore.rollout.samples import Sample, whole
from tests.test_losses import network

REWARDS, VALUES = [-0.1, 0.3, -0.2, 1.5], [0.4, -0.3, 0.8, 0.2]


def advantages_by_definition(rewards, values, gamma, lam):
    """A_t = sum_l (gamma lam)^l d_{t+l}: the sum itself, not its recursion."""
    after = [*values[1:], 0.0]
    errors = [r + gamma * then - now for r, then, now in zip(rewards, after, values, strict=True)]
    return [sum((gamma * lam) ** k * error for k, error in enumerate(errors[t:])) for t in range(len(errors))]


def whitened_by_definition(numbers):
    mean = sum(numbers) / len(numbers)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers))
    return [(x - mean) / deviation for x in numbers]


# Advantages.


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_advantages_are_discounted_sums_of_errors(gamma, lam):
    (found,) = generalized_advantages(torch.tensor([REWARDS]), torch.tensor([VALUES]), gamma, lam).tolist()
    assert found == pytest.approx(advantages_by_definition(REWARDS, VALUES, gamma, lam), abs=1e-6)


def test_whole_completion_advantages_plus_values_are_the_sums_of_later_rewards():
    (advantages,) = generalized_advantages(torch.tensor([REWARDS]), torch.tensor([VALUES]), gamma=1.0, lam=1.0)
    later = [sum(REWARDS[t:]) for t in range(len(REWARDS))]
    assert (advantages + torch.tensor(VALUES)).tolist() == pytest.approx(later, abs=1e-6)


def test_values_that_expect_exactly_what_comes_leave_no_advantage():
    later = torch.tensor([sum(REWARDS[t:]) for t in range(len(REWARDS))])
    for lam in (0.0, 0.5, 1.0):
        found = generalized_advantages(torch.tensor([REWARDS]), later[None], 1.0, lam)
        torch.testing.assert_close(found, torch.zeros(1, 4), rtol=0, atol=1e-6)


def one_completion_at_a_time(rewards, values, gamma, lam):
    """The recursion of equation 16 over the tokens (T,) of one completion."""
    following, after, advantages = torch.cat([values[1:], torch.zeros(1)]), torch.zeros(()), torch.zeros(len(rewards))
    for t in reversed(range(len(rewards))):
        advantages[t] = after = rewards[t] + gamma * following[t] - values[t] + gamma * lam * after
    return advantages


def test_advantages_of_many_completions_are_those_of_each_alone():
    random, lengths = torch.Generator().manual_seed(0), [1, 40, 7, 64, 64, 2]
    alone = [torch.randn(2, length, generator=random) for length in lengths]
    rewards, values = torch.nn.utils.rnn.pad_sequence([one.T for one in alone], batch_first=True).unbind(2)
    found = generalized_advantages(rewards, values, 0.99, 0.95)
    for advantages, length, (own_rewards, own_values) in zip(found, lengths, alone, strict=True):
        expected = one_completion_at_a_time(own_rewards, own_values, 0.99, 0.95)
        torch.testing.assert_close(advantages[:length], expected, rtol=0, atol=0)
        assert not advantages[length:].any()


def test_whitened_numbers_have_mean_zero_and_variance_one_and_equal_ones_become_zero():
    found = whitened(torch.tensor(REWARDS), [moments(torch.tensor(REWARDS))]).tolist()
    assert found == pytest.approx(whitened_by_definition(REWARDS), abs=1e-6)
    assert sum(found) == pytest.approx(0, abs=1e-6) and sum(x * x for x in found) / 4 == pytest.approx(1, abs=1e-6)
    equal = torch.full((3,), 0.7)
    assert whitened(equal, [moments(equal)]).tolist() == pytest.approx([0, 0, 0], abs=1e-3)


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_parts_of_a_step_are_whitened_by_the_moments_of_all(cut):
    parts = torch.tensor(REWARDS).split([cut, 4 - cut])
    found = torch.cat([whitened(part, [moments(other) for other in parts]) for part in parts])
    assert found.tolist() == pytest.approx(whitened_by_definition(REWARDS), abs=1e-6)


# Clipping.


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # within the range: -r A, whose slope in log r is the same
        (1.5, 2.0, -2.6, 0.0),  # up far enough: held at 1 + high, no gradient
        (0.5, 2.0, -1.0, -1.0),  # good but less likely than before: counts in full
        (0.5, -2.0, 1.6, 0.0),  # down far enough: held at 1 - low, no gradient
        (1.5, -2.0, 3.0, 3.0),  # bad but likelier than before: counts in full
        (1.5, 0.0, 0.0, 0.0),  # nothing to learn
    ],
)
def test_clipped_policy_loss_by_hand(ratio, advantage, loss, slope):
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    found = clipped_policy_loss(log_ratio, torch.tensor([advantage]), low=0.2, high=0.3)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, abs=1e-6) and log_ratio.grad.item() == pytest.approx(slope, abs=1e-6)


def test_at_ratio_one_the_policy_loss_is_minus_the_mean_advantage_and_follows_it():
    log_ratio, advantages = torch.zeros(4, requires_grad=True), torch.tensor(REWARDS)
    loss = clipped_policy_loss(log_ratio, advantages, 0.2, 0.2).mean()
    loss.backward()
    assert loss.item() == pytest.approx(-sum(REWARDS) / 4, abs=1e-6)
    torch.testing.assert_close(log_ratio.grad, -advantages / 4)


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [
        (1.1, 0.5 * 0.9**2, -0.9),  # within 0.2 of the old value: half the squared error
        (1.6, 0.5 * 0.8**2, 0.0),  # beyond, towards the return 2: as if at 1.2, no gradient
        (0.5, 0.5 * 1.5**2, -1.5),  # beyond, away from it: the larger error counts
        (4.0, 0.5 * 2.0**2, 2.0),  # past the return: the larger error counts
    ],
)
def test_clipped_value_loss_by_hand(value, loss, slope):
    values = torch.tensor([value], requires_grad=True)
    found = clipped_value_loss(values, torch.tensor([1.0]), torch.tensor([2.0]), clip=0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, abs=1e-6) and values.grad.item() == pytest.approx(slope, abs=1e-6)


# The method as a whole.

SETTINGS = {
    "beta": 0.3, "clip": 0.2, "value_clip": 0.15, "value_weight": 0.4, "gamma": 0.97, "lam": 0.8, "temperature": 0.7,
    "unfinished_penalty": 0.5, "reward_model": "given by hand",
}  # fmt: skip
PROMPTS = [[5, 6, 7], [8], [9, 10]]
COMPLETIONS = [[11, 12, 13, 1], [14, 15], [16, 17, 1]]
SCORES, FINISHED = [0.8, -0.6, 1.9], [True, False, True]
# Of each token: log-probability now minus that when it was sampled, that minus the reference's, value now minus the old one.
DRIFT = [[0.4, -0.4, 0.05, -0.1], [0.3, -0.05], [-0.5, 0.1, 0.25]]
GAPS = [[0.2, -0.3, 0.6, 0.1], [-0.4, 0.5], [0.7, 0.0, -0.2]]
GROWTH = [[0.05, 0.5, -0.4, 0.1], [-0.3, 0.02], [0.6, -0.1, -0.5]]


@cache
def defaults():
    return load_config(["method=rlhf", "model=tiny"])["method"]


@pytest.fixture
def rlhf():
    """The method on a tiny network, with a value head that says something. Scores come with the samples."""
    foundation = Foundation(network("llama3", sharper=4), SimpleNamespace(pad_token_id=0))
    made = build(defaults() | SETTINGS, Method, foundation, None, RunContext(reward_model=lambda *_: None))
    torch.nn.init.normal_(made.value_head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    torch.nn.init.constant_(made.value_head.bias, 0.1)
    made.trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1)
    return made


def logps_and_values(method, prompt, completion):
    """Of each token, from the model's own logits and hidden states; the row stands alone, so nothing is padded."""
    with torch.no_grad():
        output = method.network(torch.tensor([prompt + completion]), output_hidden_states=True)
    logits, hidden = output.logits[0].tolist(), output.hidden_states[-1][0].tolist()
    weights, bias = method.value_head.weight[0].tolist(), method.value_head.bias.item()
    logps, values = [], []
    for token, before in zip(completion, range(len(prompt) - 1, len(prompt + completion) - 1), strict=True):
        scaled = [x / SETTINGS["temperature"] for x in logits[before]]
        logps.append(scaled[token] - math.log(sum(math.exp(x) for x in scaled)))
        values.append(sum(w * h for w, h in zip(weights, hidden[before], strict=True)) + bias)
    return logps, values


def minus(ones, others):
    return [one - other for one, other in zip(ones, others, strict=True)]


def sampled(id, prompt, ids, *, per_token, reward=0.0, truncated=False):
    """A sample whose numbers per token are lists."""
    whole = (id, prompt + ids, [False] * len(prompt) + [True] * len(ids))
    sizes = {"length": len(prompt + ids), "trained": len(ids), "truncated": truncated}
    numbers = {name: np.array(column, np.float32) for name, column in per_token.items()}
    return Sample(*whole, **sizes, reward=reward, parts={}, per_token=numbers)


def samples(method):
    made = []
    for k, (prompt, ids) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        logps, values = logps_and_values(method, prompt, ids)
        old = minus(logps, DRIFT[k])
        numbers = {"old_logps": old, "ref_logps": minus(old, GAPS[k]), "old_values": minus(values, GROWTH[k])}
        made.append(sampled(str(k), prompt, ids, reward=SCORES[k], truncated=not FINISHED[k], per_token=numbers))
    return made


def expected(method):
    """Losses of the step and the gradient of the value head's bias, by the equations."""
    rewards, old_values, values = [], [], []
    for k, (prompt, ids) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        values.append(logps_and_values(method, prompt, ids)[1])
        old_values.append(minus(values[k], GROWTH[k]))
        rewards.append([-SETTINGS["beta"] * gap for gap in GAPS[k]])
        rewards[k][-1] += SCORES[k] - (0.0 if FINISHED[k] else SETTINGS["unfinished_penalty"])
    raw = [
        advantages_by_definition(r, v, SETTINGS["gamma"], SETTINGS["lam"])
        for r, v in zip(rewards, old_values, strict=True)
    ]
    advantages = whitened_by_definition([a for row in raw for a in row])
    policy = value = bias = 0.0
    tokens = [(k, t) for k, row in enumerate(raw) for t in range(len(row))]
    for (k, t), advantage in zip(tokens, advantages, strict=True):
        ratio = math.exp(DRIFT[k][t])
        held = min(max(ratio, 1 - SETTINGS["clip"]), 1 + SETTINGS["clip"])
        policy -= min(ratio * advantage, held * advantage)
        old, now, target = old_values[k][t], values[k][t], raw[k][t] + old_values[k][t]
        near = min(max(now, old - SETTINGS["value_clip"]), old + SETTINGS["value_clip"])
        value += max((now - target) ** 2, (near - target) ** 2) / 2
        bias += now - target if (now - target) ** 2 >= (near - target) ** 2 else 0.0
    n = len(tokens)
    return {"policy": policy / n, "value": value / n, "bias": SETTINGS["value_weight"] * bias / n}


def test_losses_of_a_step_are_those_of_the_equations(rlhf):
    """From scores and log-probabilities to the loss, two rows at a time as in a run."""
    trained = rlhf.compute_advantages([[one] for one in samples(rlhf)])
    sizes = {"global_batch_size": 4, "micro_batch_size": 2, "seed": 0, "rank": 0, "world_size": 1}
    none = {"retention_rows": 0, "retention_every": 1}
    batches = TrainBatches(trained, rlhf.collate, rlhf.counts, rlhf.collate_text, steps=1, **sizes, **none)
    loss = sum(rlhf.training_step(batch, 0) for batch in batches)
    loss.backward()
    by_hand = expected(rlhf)
    found = {name: rlhf.step_metrics[name].item() for name in ("policy", "value")}
    assert found == pytest.approx({name: by_hand[name] for name in found}, abs=1e-5)
    assert loss.item() == pytest.approx(by_hand["policy"] + SETTINGS["value_weight"] * by_hand["value"], abs=1e-5)
    assert rlhf.value_head.bias.grad.item() == pytest.approx(by_hand["bias"], abs=1e-5)
    assert 0 < rlhf.step_metrics["clipped"] < 1


def test_right_after_sampling_ratios_are_one_and_value_errors_are_the_advantages(rlhf):
    """`compute_per_token` keeps the values that `loss` finds again, and the reference is what the policy still is."""
    made = samples(rlhf)
    now = [logps_and_values(rlhf, prompt, ids) for prompt, ids in zip(PROMPTS, COMPLETIONS, strict=True)]
    for one, (logps, _) in zip(made, now, strict=True):
        one.per_token.clear()
        one.per_token["old_logps"] = np.array(logps, np.float32)
    rlhf.compute_per_token(made, rlhf.collate_text(made))
    for one, (logps, values) in zip(made, now, strict=True):
        assert one.per_token["ref_logps"] == pytest.approx(logps, abs=1e-5)
        assert one.per_token["old_values"] == pytest.approx(values, abs=1e-5)
    terms = rlhf.loss(rlhf.collate(rlhf.compute_advantages([made])))
    errors = [error for one in made for error in minus(one.per_token["returns"], one.per_token["old_values"])]
    assert terms["policy"].total.item() == pytest.approx(0, abs=1e-5)  # minus the sum of whitened advantages
    assert terms["value"].total.item() == pytest.approx(sum(error**2 for error in errors) / 2, abs=1e-5)
    assert terms["clipped"].total == 0


# Several processes.


def as_process(monkeypatch, rank):
    """This process is number `rank` of two."""
    for module in ("ftcore.machine.processes", "ftcore.rollout.samples"):
        monkeypatch.setattr(f"{module}.rank_and_world", lambda: (rank, 2))


def test_other_processes_get_outlines_of_samples(rlhf, monkeypatch):
    made, sent = samples(rlhf), []
    others = [[made[1].outline()]]
    as_process(monkeypatch, 0)
    monkeypatch.setattr("ftcore.machine.processes.gathered", lambda part: sent.append(part) or [part, others])
    monkeypatch.setattr(RLHF, "_groups", lambda _, prompts: [[made[0]], [made[2]]])
    groups = rlhf.sample_groups([None] * 3, np.random.default_rng(0))
    assert groups == [[made[0]], [made[1].outline()], [made[2]]] and whole(chain(*groups)) == [made[0], made[2]]
    assert sent == [[[made[0].outline()], [made[2].outline()]]]
    for one in made:
        outline = one.outline()
        assert not outline.input_ids and not outline.per_token and not outline.completion_mask
        assert (len(outline), outline.trained) == (len(one), one.trained) and rlhf.counts(outline) == rlhf.counts(one)


def test_each_process_gets_the_samples_it_trains_on(rlhf, monkeypatch):
    """Process 0 made samples 0 and 2, process 1 made sample 1; then 0 trains on sample 0 and process 1 on the others."""
    made, sent = samples(rlhf), {}
    for rank, has in ((0, {0, 2}), (1, {1})):

        def exchanged(parts, rank=rank):
            sent[rank] = parts
            return [parts[rank] for parts in sent.values()]

        as_process(monkeypatch, rank)
        monkeypatch.setattr("ftcore.rollout.samples.dealt", exchanged)
        found = rlhf.deal([one if k in has else one.outline() for k, one in enumerate(made)], [0, 1, 1])
    assert sent == {0: [{}, {2: made[2]}], 1: [{}, {}]}
    assert found[1:] == made[1:]


def test_advantages_of_two_processes_are_those_of_the_whole_step(rlhf, monkeypatch):
    alone = {one.id: one.per_token for one in rlhf.compute_advantages([[one] for one in samples(rlhf)])}
    told, made = [], [samples(rlhf), samples(rlhf)]
    for _ in range(2):  # in the second round each process knows what the other will say
        for rank, own in enumerate(({"0", "2"}, {"1"})):
            groups = [[one if one.id in own else one.outline()] for one in made[rank]]
            monkeypatch.setattr("ftcore.methods.rlhf.gathered", lambda part: told.append(part) or told[:2])
            found = whole(rlhf.compute_advantages(groups))
            assert {one.id for one in found} == own
            if len(told) > 2:
                for one in found:
                    for name in ("advantages", "returns"):
                        assert one.per_token[name] == pytest.approx(alone[one.id][name], abs=1e-6)
