"""From a config to what a run works on: rows, method, batches."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from ftcore.config.build import build, locate
from ftcore.data import Data, Records
from ftcore.data.examples import Example
from ftcore.data.steps import TrainBatches
from ftcore.data.token_cache import lengths, stored
from ftcore.data.tokens import Encoder
from ftcore.errors import ConfigError, DataError
from ftcore.evaluate.held_out import general_texts, load_held_out
from ftcore.files import home
from ftcore.machine.hardware import CPU_TOKENS, micro_batch
from ftcore.methods.base import HeldOut, Method, RunContext, own_settings
from ftcore.models import sharding
from ftcore.models.blocks import transformer_blocks
from ftcore.models.foundation import Foundation, foundation_of
from ftcore.models.precision import cast_weights
from ftcore.models.reference import ReferenceSums, base_key
from ftcore.settings import Config, Hardware, Resolved

# Training rows whose tokens are compared with those of the tokenizer's own chat template in every run; `inspect` compares all.
CHECKED = 100


@dataclass
class Job:
    """What a run works on: built by `prepare`, fitted by `run`."""

    method: Method
    records: Records
    batches: TrainBatches
    validation: DataLoader | None
    held_out: HeldOut


def prepare(config: Config, resolved: Resolved, records: Records | None = None) -> Job:
    """Load rows, then the model and its method, then make batches, whose number gives the steps."""
    data = build(config["data"], Data)
    records = records or data.load(locate(config["method"], Method).record_type)

    with sharding.in_shares(resolved.machine):
        method = load_method(config, resolved, data)
    method.encoder.check_template(records.train[:CHECKED])
    # Examples are cached under a hash of the method's own settings: those that all methods share do not change them.
    train = stored(records.train, method.encode, method.encoder, own_settings(config["method"]))
    method.encoder.check_lost(len(records.train))
    validation = method.encode(records.validation)
    if not train:
        raise DataError(
            f"No training row is left: each is longer ({method.encoder.limit}) and dropped. {method.encoder.more_room}, or cut "
            "rows with data.too_long=truncate."
        )
    batches = train_batches(config, resolved, method, train)
    held_out = load_held_out(config, data, method, records)
    return Job(method, records, batches, _validation_batches(validation, method, batches), held_out)


def load_method(config: Config, resolved: Resolved, data: Data, **context: Any) -> Method:
    """Load the foundation, add the adapter and build the method on it, in training mode. `context` replaces settings of it."""
    foundation, kind = _load_foundation(config, resolved), locate(config["method"], Method)
    settings: dict[str, Any] = {
        "micro_batch_size": resolved.micro_batch_size,
        "max_bad_steps": config["max_bad_steps"],
        "retention_weight": config["retention"]["weight"],
        "references": ReferenceSums(home() / "references" / base_key(config, resolved) if kind.has_reference else None),
        "row_losses": config["ledger"],
        "precision": resolved.machine.precision,
    }
    encoder = Encoder(foundation.tokenizer, data)
    method = build(config["method"], Method, foundation, encoder, RunContext(**settings | context))
    _tune(method.network.train(), config["hardware"])
    # Outputs of frozen blocks are cached where the same rows come again and every process has all weights.
    unsharded = resolved.machine.strategy != "fsdp" and not config["hardware"]["compile"]
    if foundation.keep_activations_gb and method.rows_recur and unsharded:
        name = f"{base_key(config, resolved)}-{foundation.frozen_blocks}"
        foundation.cache_activations(home() / "activations" / name)
    return method


def _load_foundation(config: Config, resolved: Resolved) -> Foundation:
    """The network with its adapter."""
    if config["adapter"].get("load_in_4bit") and resolved.machine.strategy == "fsdp":
        raise ConfigError("adapter=qlora cannot be sharded: use hardware.strategy=ddp, or adapter=lora.")
    lightning.seed_everything(config["seed"], verbose=False)
    foundation = foundation_of(config)
    # Again, so that an adapter's weights do not depend on how the model loads.
    lightning.seed_everything(config["seed"], verbose=False)
    foundation = build(config["adapter"], Foundation, foundation)
    cast_weights(foundation.network, resolved.machine.precision)
    return foundation


def _tune(network: Any, hardware: Hardware) -> None:
    """Apply the hardware settings that save memory or time and change no result."""
    if hardware["activation_checkpointing"] is True:
        try:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(f"hardware.activation_checkpointing: {error}") from None
    if hardware["compile"]:
        for block in transformer_blocks(network):
            block.compile(dynamic=True)


def train_batches(config: Config, resolved: Resolved, method: Method, examples: Sequence[Any]) -> TrainBatches:
    """The micro-batches of all steps: `max_steps` or `max_epochs`, whichever ends first."""
    rows_per_step = max(config["global_batch_size"] // method.group_size, 1)
    epochs, steps, retention = config["max_epochs"], config["max_steps"] or math.inf, config["retention"]
    if epochs:
        steps = min(steps, math.ceil(epochs * math.ceil(len(examples) / rows_per_step) * method.updates))
    general = general_texts(retention["text"]) if method.retention_weight else []
    return TrainBatches(
        examples,
        method.collate,
        method.counts,
        method.collate_text,
        method.encode_text(general, retention["length"]) if general else [],
        method.rows_of_step,
        method.arrange,
        method.deal,
        retention_rows=retention["rows"],
        retention_every=retention["every"],
        steps=int(steps),
        rows_per_step=rows_per_step,
        updates=method.updates,
        global_batch_size=config["global_batch_size"],
        micro_batch_size=_micro_batch_size(config, resolved, lengths(examples)),
        seed=config["seed"],
        rank=int(os.environ.get("RANK", 0)),
        world_size=resolved.machine.processes,
    )


def _micro_batch_size(config: Config, resolved: Resolved, tokens: list[int]) -> int:
    """Rows per forward pass. With micro_batch_size=auto, a CPU gets only as many as keep it busy."""
    most = resolved.micro_batch_size
    if resolved.machine.accelerator == "cpu":
        most = min(most, int(CPU_TOKENS / np.quantile(tokens, 0.9)))
    return micro_batch(
        global_batch_size=config["global_batch_size"],
        micro_batch_size=config["micro_batch_size"],
        processes=resolved.machine.processes,
        most=most,
    )


def _validation_batches(examples: list[Example], method: Method, batches: TrainBatches) -> DataLoader | None:
    """This process's validation batches. All processes get the same number, the last ones without rows."""
    size = batches.micro_batch_size
    size_of_all = size * batches.world_size
    starts = range(batches.rank * size, math.ceil(len(examples) / size_of_all) * size_of_all, size_of_all)
    collated = [method.collate(examples[start : start + size]) for start in starts]
    # Its own generator: making an iterator would draw from the one that training draws from.
    return DataLoader(collated, batch_size=None, generator=torch.Generator()) if collated else None  # type: ignore[arg-type]
