"""Loss and gradients of one optimizer step equal those of TRL's trainers on the same weights and the same token ids.

TRL's side is its real trainer, built from its own config, with its own collator and `compute_loss` on the whole batch. ftcore's
side is its loader and `training_step`, two rows at a time, so that dividing sums by the step's counts is part of what is
compared. Policy and reference are different random networks: no loss starts at a trivial value.
"""

import copy
import math
from functools import cache
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from ftcore.config import build, load_config
from ftcore.data.batches import TrainBatches, pad
from ftcore.data.tokens import Example, Pair
from ftcore.data.transforms import mismatched
from ftcore.logits import completion_logps
from ftcore.losses import log_odds
from ftcore.methods.grpo import advantages
from ftcore.methods.kto import Labelled
from ftcore.methods.online import Sample
from ftcore.model import Foundation
from ftcore.resources import PACKAGE
from ftcore.rollout import Completion

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5  # of the loss, and of each gradient entry relative to the largest one of its parameter
TOKENIZER = AutoTokenizer.from_pretrained(PACKAGE / "datasets" / "tiny")
CONFIG = LlamaConfig(
    vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=TOKENIZER.pad_token_id, eos_token_id=TOKENIZER.eos_token_id,
    bos_token_id=None,
)  # fmt: skip

# Prompt, chosen and rejected token ids; every length occurs in different company, so that padding differs between both sides.
PROMPTS = [[11, 12, 13], [21], [31, 32], [41, 42, 43, 44]]
CHOSEN = [[110, 111, 112, 2], [120, 121, 2], [130, 131, 132, 133, 134, 2], [140, 2]]
REJECTED = [[210, 2], [220, 221, 222, 223, 2], [230, 231, 2], [240, 241, 242, 2]]
MARGINS = [0.3, 0.0, 1.2, 0.7]

TEMPERATURE, MAX_NEW_TOKENS = 0.8, 8
ADVANTAGES = [1.2, -0.4, 0.7, -1.5]
# Log-probabilities now minus those at sampling. With the advantages' signs: clipped above, clipped below, and twice outside the
# range on the side where the smaller of the two products is the unclipped one.
DRIFT = [0.45, -0.4, -0.35, 0.5]


def network(seed, auto=AutoModelForCausalLM, **config):
    """Random weights, about as sharp as a trained model's."""
    torch.manual_seed(seed)
    model = auto.from_config(LlamaConfig(**CONFIG.to_dict() | config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def policy():
    return network(0)


def reference():
    return network(1).eval().requires_grad_(False)


def scorer():
    return network(0, AutoModelForSequenceClassification, id2label={0: "score"})


@cache
def defaults(name):
    return load_config([f"method={name}", "model=tiny"])["method"]


def method(name, model=policy, **changes):
    """A method as a run builds it, with `reference` as its base model."""
    foundation = Foundation(model(), TOKENIZER, frozen_copy=reference())
    built = build(defaults(name) | changes, foundation, None)
    built.micro_batch_size = 2
    # Lightning averages over micro-batches, which training_step undoes; here their losses are added.
    built.trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1)
    return built


def step(method, examples):
    """ftcore's loss of one optimizer step, and its gradients."""
    layout = {"micro_batch_size": 2, "global_batch_size": len(examples), "seed": 0, "rank": 0, "world_size": 1}
    loader = TrainBatches(examples, method.collate, method.counts, steps=1, retention_rows=0, retention_every=1, **layout)
    return differentiated(sum(method.training_step(batch, 0) for batch in loader), method.network)


def trl_step(trainer, rows):
    """TRL's loss of rows, which its own collator puts together, and the gradients."""
    return trl_loss(trainer, trainer.data_collator(rows))


def trl_loss(trainer, batch):
    trainer.current_gradient_accumulation_steps = 1
    return differentiated(trainer.compute_loss(trainer.model.train(), batch), trainer.model)


def differentiated(loss, network):
    loss.backward()
    return loss.item(), {name: p.grad for name, p in network.named_parameters()}


def assert_equal(ours, theirs):
    (loss, gradients), (their_loss, their_gradients) = ours, theirs
    assert loss == pytest.approx(their_loss, abs=TOLERANCE)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        largest = their_gradients[name].abs().max()
        assert largest > 0, name
        assert (gradient - their_gradients[name]).abs().max() <= TOLERANCE * largest, name


def built(trainer, config, model, tmp_path, rows, *given, options=(), **changes):
    """A trainer of TRL's on CPU. `rows` are what it asks for at construction, never what is compared."""
    from datasets import Dataset

    arguments = config(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=4, disable_tqdm=True, **changes,
    )  # fmt: skip
    return trainer(
        model, *given, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=TOKENIZER, **dict(options)
    )


def example(prompt, completion, kind=Example, **more):
    mask = [False] * len(prompt) + [True] * len(completion)
    return kind(f"{prompt}", prompt + completion, mask, **more)
