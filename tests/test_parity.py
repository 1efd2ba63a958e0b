"""Loss and gradients of one optimizer step equal those of TRL's trainers on the same weights and the same token ids.

TRL's side is its real trainer, built from its own config, with its own collator and `compute_loss`, on the whole batch. ftcore's
side is its loader and `training_step`, two rows at a time, so that dividing sums by the counts of the step is compared as well.
Policy and reference are different random networks: no loss stands at a trivial value.
"""

from functools import cache
from importlib import import_module
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from ftcore.config.build import build
from ftcore.config.compose import load_config
from ftcore.data.examples import Example, Pair
from ftcore.data.layouts import pad
from ftcore.data.steps import TrainBatches
from ftcore.data.transforms import mismatched
from ftcore.files import PACKAGE
from ftcore.methods.base import Method
from ftcore.methods.grpo import advantages
from ftcore.methods.kto import Labelled
from ftcore.methods.losses import log_odds
from ftcore.models.foundation import Foundation
from ftcore.models.logprobs import completion_logps
from tests.test_ppo import sampled

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5  # of the loss, and of each entry of a gradient relative to the largest one of its parameter
TOKENIZER = AutoTokenizer.from_pretrained(PACKAGE / "datasets" / "tiny")
CONFIG = LlamaConfig(
    vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=TOKENIZER.pad_token_id, eos_token_id=TOKENIZER.eos_token_id,
    bos_token_id=None, id2label={0: "score"},
)  # fmt: skip

# Token ids. The lengths differ, so each side pads its batches in its own way.
PROMPTS = [[11, 12, 13], [21], [31, 32], [41, 42, 43, 44]]
CHOSEN = [[110, 111, 112, 2], [120, 121, 2], [130, 131, 132, 133, 134, 2], [140, 2]]
REJECTED = [[210, 2], [220, 221, 222, 223, 2], [230, 231, 2], [240, 241, 242, 2]]
MARGINS = [0.3, 0.0, 1.2, 0.7]
GOOD = [True, False, False, True]

# Rollouts: two completions, the chosen ones, of two prompts each.
TEMPERATURE, LONGEST = 0.8, 8
ADVANTAGES = [1.2, -0.4, 0.7, -1.5]
# By how much each completion's tokens have become likelier since they were sampled. With the signs of the advantages: clipped
# above, clipped below, and two outside the range whose unclipped product is the smaller one, so that they count in full.
DRIFT = [0.45, -0.4, -0.35, 0.5]


def network(seed, auto=AutoModelForCausalLM):
    """Random weights, with matrices large enough that attention is not flat and tokens are not equally likely."""
    torch.manual_seed(seed)
    model = auto.from_config(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def policy():
    return network(0)


def scorer():
    return network(0, AutoModelForSequenceClassification)


def reference():
    return network(2)


# ftcore's side.


@cache
def defaults(name):
    return load_config([f"method={name}", "model=tiny"])["method"]


def method(name, model=policy, **changes):
    """A method as a run builds it, with `reference` as its base model."""
    foundation = Foundation(model(), TOKENIZER, frozen_copy=reference())
    made = build(defaults(name) | changes, Method, foundation, SimpleNamespace(max_length=None))
    # Lightning takes the mean over micro-batches and training_step undoes that; here their losses are added.
    made.trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1)
    return made


def step(method, examples):
    """Loss and gradients of one optimizer step."""
    sizes = {"global_batch_size": len(examples), "micro_batch_size": 2, "seed": 0, "rank": 0, "world_size": 1}
    none = {"retention_rows": 0, "retention_every": 1}
    batches = TrainBatches(examples, method.collate, method.counts, method.collate_text, steps=1, **sizes, **none)
    return differentiated(sum(method.training_step(batch, 0) for batch in batches), method.network)


def differentiated(loss, model):
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def example(id, prompt, completion, kind=Example, **more):
    return kind(str(id), prompt + completion, [False] * len(prompt) + [True] * len(completion), **more)


def examples():
    return [example(k, *row) for k, row in enumerate(zip(PROMPTS, CHOSEN, strict=True))]


def pairs(prompts=PROMPTS, margins=(0.0,) * 4):
    rows = enumerate(zip(prompts, CHOSEN, REJECTED, margins, strict=True))
    return [Pair(str(k), example(k, p, chosen), example(k, p, rejected), m) for k, (p, chosen, rejected, m) in rows]


# TRL's side.


def trl(name, tmp_path, model, *given, more=None, **config):
    """A trainer of TRL's on the CPU. The one row of text satisfies its constructor; batches are made of token ids."""
    from datasets import Dataset

    module = import_module(f"trl.experimental.{name.lower()}" if name in ("ORPO", "CPO") else "trl")
    completion = {"completion": " b", "label": True} if name == "KTO" else {"completion": " b"}
    answers = {"chosen": " b", "rejected": " c"} if name in ("DPO", "ORPO", "CPO", "Reward") else completion
    fixed = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    fixed |= {"gradient_checkpointing": False, "per_device_train_batch_size": 4}
    arguments = getattr(module, f"{name}Config")(**fixed | config)
    return getattr(module, f"{name}Trainer")(
        model, *given, args=arguments, train_dataset=Dataset.from_list([{"prompt": "a", **answers}] * 4),
        processing_class=TOKENIZER, **(more or {}),
    )  # fmt: skip


def trl_step(trainer, rows):
    """TRL's loss of rows that its own collator puts together, and the gradients."""
    return trl_loss(trainer, trainer.data_collator(rows))


def trl_loss(trainer, batch):
    trainer.current_gradient_accumulation_steps = 1  # its training loop sets this
    return differentiated(trainer.compute_loss(trainer.model.train(), batch), trainer.model)


def preferences(prompts=PROMPTS):
    rows = zip(prompts, CHOSEN, REJECTED, strict=True)
    return [{"prompt_ids": p, "chosen_ids": chosen, "rejected_ids": rejected} for p, chosen, rejected in rows]


def labelled_preferences(prompts=PROMPTS):
    """Rows as the experimental trainers tokenize them: whole sequences, and labels without the prompt."""
    rows = []
    for row in preferences(prompts):
        prompt, sides = row["prompt_ids"], {"chosen": row["chosen_ids"], "rejected": row["rejected_ids"]}
        rows.append({})
        for side, answer in sides.items():
            rows[-1][f"{side}_input_ids"] = prompt + answer
            rows[-1][f"{side}_attention_mask"] = [1] * len(prompt + answer)
            rows[-1][f"{side}_labels"] = [-100] * len(prompt) + answer
    return rows


def assert_equal(ours, theirs):
    """Equal losses and gradients; every parameter has one on both sides."""
    (loss, gradients), (their_loss, their_gradients) = ours, theirs
    assert loss == pytest.approx(their_loss, abs=TOLERANCE, rel=0)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        largest = their_gradients[name].abs().max()
        assert largest > 0, name
        assert (gradient - their_gradients[name]).abs().max() <= TOLERANCE * largest, name


# Supervised.


@pytest.mark.parametrize("packing", [False, True])
def test_sft(tmp_path, packing):
    rows = [
        {"input_ids": e.input_ids, "labels": [-100] * len(p) + c}
        for e, p, c in zip(examples(), PROMPTS, CHOSEN, strict=True)
    ]
    theirs = trl_step(trl("SFT", tmp_path, policy()), rows)
    assert_equal(step(method("sft", packing=packing), examples()), theirs)


@pytest.mark.parametrize("margins", [[0.0] * 4, MARGINS])
@pytest.mark.parametrize("centering", [0.0, 0.05])
def test_reward(tmp_path, margins, centering):
    trainer = trl("Reward", tmp_path, scorer(), center_rewards_coefficient=centering or None)
    rows = [
        {"chosen_ids": pair.chosen.input_ids, "rejected_ids": pair.rejected.input_ids}
        | ({"margin": pair.margin} if any(margins) else {})
        for pair in pairs(margins=margins)
    ]
    ours = step(method("reward", scorer, centering=centering), pairs(margins=margins))
    assert_equal(ours, trl_step(trainer, rows))


# Preferences.


def test_dpo(tmp_path):
    trainer = trl("DPO", tmp_path, policy(), reference(), loss_type="sigmoid", beta=0.2)
    assert_equal(step(method("dpo", beta=0.2), pairs()), trl_step(trainer, preferences()))


def test_dpo_with_label_smoothing(tmp_path):
    """TRL smooths labels this way in `aot` alone. That sorts the log-ratios of a batch, so one pair at a time it is DPO."""
    trainer = trl("DPO", tmp_path, policy(), reference(), loss_type="aot", beta=0.2, label_smoothing=0.1)
    steps = [trl_step(trainer, [row]) for row in preferences()]  # gradients add up in the parameters
    mean = sum(loss for loss, _ in steps) / 4, {name: gradient / 4 for name, gradient in steps[-1][1].items()}
    assert_equal(step(method("dpo", beta=0.2, label_smoothing=0.1), pairs()), mean)


def test_ipo(tmp_path):
    trainer = trl("DPO", tmp_path, policy(), reference(), loss_type="ipo", beta=0.2)
    assert_equal(step(method("ipo", beta=0.2), pairs()), trl_step(trainer, preferences()))


def test_slic(tmp_path):
    trainer = trl("DPO", tmp_path, policy(), reference(), loss_type="hinge", beta=0.2)
    assert_equal(step(method("slic", beta=0.2), pairs()), trl_step(trainer, preferences()))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("nll_weight", [0.0, 0.7])
def test_cpo(tmp_path, label_smoothing, nll_weight):
    trainer = trl("CPO", tmp_path, policy(), beta=0.2, label_smoothing=label_smoothing, cpo_alpha=nll_weight)
    ours = step(method("cpo", beta=0.2, label_smoothing=label_smoothing, nll_weight=nll_weight), pairs())
    assert_equal(ours, trl_step(trainer, labelled_preferences()))


def test_simpo(tmp_path):
    trainer = trl("CPO", tmp_path, policy(), loss_type="simpo", beta=2.0, simpo_gamma=0.8, cpo_alpha=0.0)
    ours = step(method("simpo", beta=2.0, gamma=0.8), pairs())
    assert_equal(ours, trl_step(trainer, labelled_preferences()))


def test_orpo(tmp_path):
    """TRL's likelihood term takes the prompt in, the paper's does not: prompts of one token have nothing to predict."""
    prompts = [prompt[:1] for prompt in PROMPTS]
    trainer = trl("ORPO", tmp_path, policy(), beta=0.3)
    assert_equal(step(method("orpo", beta=0.3), pairs(prompts)), trl_step(trainer, labelled_preferences(prompts)))


@pytest.mark.parametrize("mean_logp", [-20.0, -1.0, -1e-2, -1e-4, -1e-6])
def test_log_odds_of_answers_that_are_all_but_certain(mean_logp):
    """1 - p is then no larger than the rounding of p, and must not be computed as that difference."""
    from trl.experimental.orpo.orpo_trainer import log1mexp

    mean = torch.tensor(mean_logp)
    assert log_odds(mean).item() == pytest.approx((mean - log1mexp(mean)).item(), rel=1e-6)


def test_log_odds_of_a_certain_answer_are_finite_and_have_no_gradient():
    """Where TRL divides by zero: float32 rounds the probability of an answer learnt by heart to 1."""
    certain = torch.zeros(1, requires_grad=True)
    odds = log_odds(certain)
    odds.backward()
    assert 15 < odds.item() < 20 and certain.grad.item() == 0


@pytest.mark.parametrize("swapped", [False, True])
def test_kto(tmp_path, swapped):
    """With policy and reference swapped the KL estimate is below zero, and both sides take zero for it."""
    policy_of, reference_of = (reference, policy) if swapped else (policy, reference)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    kto = method("kto", policy_of, beta=0.2, **weights)
    kto.foundation.frozen_copy = reference_of()
    labelled = [
        example(k, *row, kind=Labelled, good=good)
        for k, (*row, good) in enumerate(zip(PROMPTS, CHOSEN, GOOD, strict=True))
    ]
    prepared = kto.prepare(lambda: labelled, None)
    assert (prepared[0].z == 0) == swapped
    # Any pairing of prompts with other rows' answers estimates the KL; TRL's dataset would take the row before.
    others = [e.input_ids[len(p) :] for e, p in zip(mismatched(labelled), PROMPTS, strict=True)]
    rows = [
        {"prompt_ids": p, "completion_ids": c, "KL_completion_ids": other, "label": good}
        for p, c, other, good in zip(PROMPTS, CHOSEN, others, GOOD, strict=True)
    ]
    trainer = trl("KTO", tmp_path, policy_of(), reference_of(), beta=0.2, **weights)
    assert_equal(step(kto, prepared), trl_step(trainer, rows))


# Online.


def rollouts(method, drift=DRIFT):
    """Samples whose log-probabilities when sampled were other than the policy's now."""
    method.temperature, method.max_new_tokens = TEMPERATURE, LONGEST
    with torch.no_grad():
        now = completion_logps(method.network, pad(examples(), 0), TEMPERATURE).split([len(c) for c in CHOSEN])
    samples = []
    for one, ids, logps, by, advantage in zip(examples(), CHOSEN, now, drift, ADVANTAGES, strict=True):
        old = [logp - by * (0.4 if k % 2 else 1.4) for k, logp in enumerate(logps.tolist())]  # tokens differ, too
        numbers = {"old_logps": old, "advantages": [advantage] * len(ids)}
        samples.append(sampled(one.id, one.input_ids[: -len(ids)], ids, per_token=numbers))
    method.compute_per_token(samples, method.collate_text(samples))
    return samples


def trl_rollouts(samples):
    """The same as TRL lays them out: prompts padded on the left, completions on the right."""
    from trl.trainer.utils import pad as side_by_side

    def padded(rows, value, side="right", dtype=torch.long):
        return side_by_side([torch.tensor(row, dtype=dtype) for row in rows], value, side)

    mask = padded([[1] * len(ids) for ids in CHOSEN], 0)
    old = padded([one.per_token["old_logps"] for one in samples], 0.0, dtype=torch.float32)
    return {
        "prompt_ids": padded(PROMPTS, TOKENIZER.pad_token_id, "left"),
        "prompt_mask": padded([[1] * len(ids) for ids in PROMPTS], 0, "left"),
        "completion_ids": padded(CHOSEN, TOKENIZER.pad_token_id),
        "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": old,
        "old_logps": old.sum(1),
    }


def online(name, tmp_path, reward=lambda completions, **_: [0.0] * len(completions), **config):
    fixed = {"num_generations": 2, "max_completion_length": LONGEST, "temperature": TEMPERATURE, "beta": 0.0}
    return trl(name, tmp_path, policy(), more={"reward_funcs": reward}, **fixed | config)


def with_reference(trainer, batch, beta):
    """Turn on the KL term. TRL would load the reference from where the policy's weights came from."""
    from trl.trainer.utils import add_fused_lm_head

    trainer.beta, trainer.ref_model = beta, reference()
    add_fused_lm_head(trainer.ref_model, temperature=TEMPERATURE)
    ids, mask = (torch.cat([batch[f"prompt_{k}"], batch[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(
            trainer.ref_model, ids, mask, batch["completion_ids"].size(1)
        )
    batch["ref_per_token_logps"] = logps[0]


def assert_clips_on_both_sides(method):
    """Some tokens are clipped above, some below, and some on neither side."""
    low, high = (method.step_metrics[f"clipped/{side}"].item() for side in ("low", "high"))
    assert low > 0 and high > 0 and low + high < 1


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("ratio", "level"), [("token", "token"), ("sequence_mean", "sequence")], ids=["token", "gspo"])
@pytest.mark.parametrize(("aggregate", "loss_type"), [("tokens", "dapo"), ("sequences", "grpo"), ("budget", "dr_grpo")])
def test_grpo(tmp_path, aggregate, loss_type, ratio, level, beta):
    """TRL by default weighs the KL term with the probability ratio (DeepSeek-V3.2), the GRPO paper and ftcore do not."""
    grpo = method("grpo", aggregate=aggregate, ratio=ratio, beta=beta, clip_low=0.2, clip_high=0.28)
    samples = rollouts(grpo)
    paper = {"epsilon": 0.2, "epsilon_high": 0.28, "use_bias_correction_kl": False}
    trainer = online("GRPO", tmp_path, loss_type=loss_type, importance_sampling_level=level, **paper)
    batch = trl_rollouts(samples)
    if beta:
        with_reference(trainer, batch, beta)
    assert_equal(step(grpo, samples), trl_loss(trainer, batch))
    assert_clips_on_both_sides(grpo)


def test_rloo(tmp_path):
    """Without the KL penalty, which TRL's RLOO subtracts from the rewards and ours adds to the loss."""
    rloo = method(
        "grpo", advantage="rloo", ratio="sequence", aggregate="sequences", beta=0.0, clip_low=0.2, clip_high=0.28
    )
    samples = rollouts(rloo)
    trainer = online("RLOO", tmp_path, epsilon=0.2, epsilon_high=0.28)
    assert_equal(step(rloo, samples), trl_loss(trainer, trl_rollouts(samples)))
    assert_clips_on_both_sides(rloo)


@pytest.mark.parametrize(
    ("kind", "name", "config"),
    [
        ("group", "GRPO", {"scale_rewards": "group"}),
        ("group_no_std", "GRPO", {"scale_rewards": "none"}),
        ("rloo", "RLOO", {}),
    ],
)
def test_advantages(tmp_path, kind, name, config):
    """Of three groups: rewards that differ, rewards that are all equal, and one completion without a reward."""
    groups = [[1.0, 0.0, 0.25, -2.0], [0.5] * 4, [1.0, None, 0.0, 0.5]]
    rewards = list(chain(*groups))
    sizes = {"num_generations": 4, "per_device_train_batch_size": len(rewards)}
    trainer = online(name, tmp_path, lambda completions, **_: rewards, **sizes, **config)
    theirs = trainer._generate_and_score_completions([{"prompt": "a"}] * len(rewards))["advantages"].tolist()
    for group, found in zip(groups, (theirs[:4], theirs[4:8], theirs[8:]), strict=True):
        kept = [advantage for reward, advantage in zip(group, found, strict=True) if reward is not None]
        ours = advantages([reward for reward in group if reward is not None], kind)
        assert ours == pytest.approx(kept, abs=TOLERANCE, rel=0)
