"""From a config to what a run works on: rows, method, batches."""

import inspect
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
from ftcore.data.sources import Row
from ftcore.data.steps import TrainBatches
from ftcore.data.token_cache import lengths, stored
from ftcore.data.tokens import Encoder, Example
from ftcore.errors import ConfigError, DataError
from ftcore.evaluate.held_out import general_texts, load_held_out
from ftcore.evaluate.score import HeldOut
from ftcore.files import home
from ftcore.kernels.frozen_blocks import KeptActivations, keep_activations
from ftcore.machine.hardware import AUTO_ROWS, CPU_TOKENS, micro_batch
from ftcore.methods.base import Method
from ftcore.models import sharding
from ftcore.models.adapters import transformer_blocks
from ftcore.models.reference import ReferenceSums, base_name, reference_file
from ftcore.settings import Config


@dataclass
class Job:
    """What a run works on: built by `prepare`, fitted by `run`."""

    method: Method
    records: Records
    batches: TrainBatches
    validation: DataLoader | None
    held_out: HeldOut


def prepare(config: Config, records: Records | None = None) -> Job:
    """Rows, then foundation, adapter and method, then batches; their number gives the steps."""
    kind: type[Method] = locate(config["method"])
    data: Data = build(config["data"])
    records = records or data.load(kind.record_type)

    method = load_method(config, data)
    train = _encoded(config, method, records.train)
    method.encoder.check_lost(len(records.train))
    validation = method.encode(records.validation)
    if not train:
        raise DataError(
            "No training row is left: each is over data.max_length and dropped. Raise it, or set data.too_long=truncate."
        )
    layout, pace = _layout(config, lengths(train)), _pace(config, method)
    method.micro_batch_size, method.max_bad_steps = layout["micro_batch_size"], config["max_bad_steps"]
    if method.has_reference:
        method.references = ReferenceSums(reference_file(config))
    _keep_activations(config, method)
    method.total_steps = steps_of_run(config, math.ceil(len(train) / pace["rows_per_step"]) * method.updates)
    keep = config["retention"]
    beside = {"retention_rows": keep["rows"], "retention_every": keep["every"], "steps": method.total_steps, **pace}
    batches = TrainBatches(
        train,
        method.collate,
        method.counts,
        _general(method, keep),
        method.rows_of_step,
        method.collate_text,
        method.arrange,
        **beside,
        **layout,
    )
    held_out = load_held_out(config, data, method, records)
    return Job(method, records, batches, _validation_batches(validation, method, layout), held_out)


def load_method(config: Config, data: Data) -> Method:
    """Foundation, adapter and method of a config; the method's network trains."""
    kind: type[Method] = locate(config["method"])
    lightning.seed_everything(config["seed"], verbose=False)
    in_4bit = config["adapter"].get("load_in_4bit", False)
    if in_4bit and config["hardware"]["strategy"] == "fsdp":
        raise ConfigError(
            "adapter=qlora cannot be shared out over processes: use hardware.strategy=ddp, or adapter=lora."
        )
    with sharding.without_storage(config["hardware"]):
        foundation = build(config["model"], kind.architecture_of(config["method"]), in_4bit)
        foundation.add_control_tokens(kind.control_tokens(config["method"], foundation.tokenizer))
        # An adapter's weights do not depend on how the model loads.
        lightning.seed_everything(config["seed"], verbose=False)
        foundation.network = build(config["adapter"], foundation)
    method: Method = build(config["method"], foundation, Encoder(foundation.tokenizer, data))
    if config["retention"]["weight"] and method.models_language:
        method.retention_weight = config["retention"]["weight"]
        foundation.keep_base()
    _tune(method.network.train(), config["hardware"])
    return method


def _tune(network: Any, hardware: Config) -> None:
    """What makes the network smaller or faster, not other."""
    if hardware["activation_checkpointing"] is True:
        try:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(f"hardware.activation_checkpointing: {error}") from None
    if hardware["compile"]:
        for block in transformer_blocks(network):
            block.compile(dynamic=True)


def _keep_activations(config: Config, method: Method) -> None:
    """Let frozen blocks remember their outputs where the same rows come again and one process has all weights."""
    foundation, hardware = method.foundation, config["hardware"]
    if (
        not foundation.keep_activations_gb
        or not method.rows_recur
        or hardware["strategy"] == "fsdp"
        or hardware["compile"]
    ):
        return
    folder = home() / "activations" / f"{base_name(config)}-{foundation.frozen_blocks}"
    kept = KeptActivations(folder, 1e9 * foundation.keep_activations_gb)
    for network in filter(None, (foundation.frozen_copy, method.network)):
        if keep_activations(network, list(transformer_blocks(network))[: foundation.frozen_blocks], kept):
            method.shares_prompts = False  # a row for each answer is what comes again


def _encoded(config: Config, method: Method, rows: list[Row]) -> Sequence[Any]:
    """Training examples, kept between runs. What a method does to rows may depend on its own keys, not on the shared ones."""
    shared = inspect.signature(Method.__init__).parameters
    return stored(rows, method.encode, method.encoder, {k: v for k, v in config["method"].items() if k not in shared})


def _general(method: Method, keep: Config) -> list[Example]:
    """Pieces of general text for the retention term; none when it is off."""
    return method.pieces(general_texts(keep["text"]), keep["length"]) if method.retention_weight else []


def _pace(config: Config, method: Method) -> dict[str, int]:
    """Rows that a step draws, a prompt for each group of completions, and updates on them."""
    return {"rows_per_step": max(config["global_batch_size"] // method.group_size, 1), "updates": method.updates}


def steps_of_run(config: Config, steps_of_epoch: int) -> int:
    """Optimizer steps from those of an epoch, max_epochs and max_steps."""
    limits = []
    if config["max_epochs"] is not None:
        limits.append(math.ceil(config["max_epochs"] * steps_of_epoch))
    if config["max_steps"] is not None:
        limits.append(config["max_steps"])
    return min(limits)


def _layout(config: Config, tokens: list[int]) -> dict[str, int]:
    """How a step's rows are dealt out; with micro_batch_size=auto a CPU takes as many as keep it busy and no more."""
    world_size = config["hardware"]["devices"] * config["hardware"]["num_nodes"]
    rows = {"global_batch_size": config["global_batch_size"], "micro_batch_size": config["micro_batch_size"]}
    most = config.get("most_rows", AUTO_ROWS)
    if not torch.cuda.is_available() or config["hardware"]["accelerator"] == "cpu":
        most = min(most, int(CPU_TOKENS / float(np.quantile(tokens, 0.9))))
    micro_batch_size = micro_batch(**rows, processes=world_size, most=most)
    rank = int(os.environ.get("RANK", 0))
    return rows | {"micro_batch_size": micro_batch_size, "seed": config["seed"], "rank": rank, "world_size": world_size}


def _validation_batches(examples: list[Example], method: Method, layout: dict[str, int]) -> DataLoader | None:
    """This process's validation batches; all processes get the same number, the last ones without rows."""
    size, world_size = layout["micro_batch_size"], layout["world_size"]
    rounds = range(math.ceil(len(examples) / (size * world_size)))
    starts = [(k * world_size + layout["rank"]) * size for k in rounds]
    batches = [method.collate(examples[start : start + size]) for start in starts]
    # Its own generator: otherwise making an iterator would draw from the one that training draws from.
    return DataLoader(batches, batch_size=None, generator=torch.Generator()) if batches else None  # type: ignore[arg-type]
