"""From a config to what a run works on: rows, method, batches."""

import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

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
from ftcore.files import home
from ftcore.machine.hardware import CPU_TOKENS, micro_batch
from ftcore.methods.base import HeldOut, Method, RunContext
from ftcore.models import sharding
from ftcore.models.blocks import transformer_blocks
from ftcore.models.foundation import Foundation, foundation_of
from ftcore.models.reference import ReferenceSums, base_key
from ftcore.settings import Config, Hardware, Resolved, Retention


@dataclass
class Job:
    """What a run works on: built by `prepare`, fitted by `run`."""

    method: Method
    records: Records
    batches: TrainBatches
    validation: DataLoader | None
    held_out: HeldOut


def prepare(config: Config, resolved: Resolved, records: Records | None = None) -> Job:
    """Rows, then foundation, adapter and method, then batches; their number gives the steps."""
    data = build(config["data"], Data)
    records = records or data.load(locate(config["method"], Method).record_type)

    method = load_method(config, resolved, data)
    train = _encoded(config, method, records.train)
    method.encoder.check_lost(len(records.train))
    validation = method.encode(records.validation)
    if not train:
        raise DataError(
            "No training row is left: each is over data.max_length and dropped. Raise it, or set data.too_long=truncate."
        )
    layout, rows_per_step = _layout(config, resolved, lengths(train)), _rows_per_step(config, method)
    batches = TrainBatches(
        train,
        method.collate,
        method.counts,
        method.collate_text,
        _general(method, config["retention"]),
        method.rows_of_step,
        method.arrange,
        retention_rows=config["retention"]["rows"],
        retention_every=config["retention"]["every"],
        steps=steps_of_run(config, math.ceil(len(train) / rows_per_step) * method.updates),
        rows_per_step=rows_per_step,
        updates=method.updates,
        **layout,
    )
    held_out = load_held_out(config, data, method, records)
    return Job(method, records, batches, _validation_batches(validation, method, layout), held_out)


def load_method(config: Config, resolved: Resolved, data: Data) -> Method:
    """Foundation, adapter and method of a config; the method's network trains."""
    foundation = _load_foundation(config, resolved)
    kind = locate(config["method"], Method)
    context = RunContext(
        micro_batch_size=resolved.micro_batch_size,
        max_bad_steps=config["max_bad_steps"],
        retention_weight=config["retention"]["weight"],
        references=ReferenceSums(home() / "references" / base_key(config, resolved) if kind.has_reference else None),
        row_losses=config["ledger"],
    )
    method = build(config["method"], Method, foundation, Encoder(foundation.tokenizer, data), context)
    _tune(method.network.train(), config["hardware"])
    # Frozen blocks remember their outputs where the same rows come again and one process has all weights.
    whole = resolved.machine.strategy != "fsdp" and not config["hardware"]["compile"]
    if foundation.keep_activations_gb and method.rows_recur and whole:
        name = f"{base_key(config, resolved)}-{foundation.frozen_blocks}"
        foundation.cache_activations(home() / "activations" / name)
    return method


def _load_foundation(config: Config, resolved: Resolved) -> Foundation:
    """The network with its adapter; in a sharded run only the first process has values."""
    if config["adapter"].get("load_in_4bit") and resolved.machine.strategy == "fsdp":
        raise ConfigError(
            "adapter=qlora cannot be shared out over processes: use hardware.strategy=ddp, or adapter=lora."
        )
    lightning.seed_everything(config["seed"], verbose=False)
    with sharding.without_storage(resolved.machine):
        foundation = foundation_of(config)
        # An adapter's weights do not depend on how the model loads.
        lightning.seed_everything(config["seed"], verbose=False)
        return build(config["adapter"], Foundation, foundation)


def _tune(network: Any, hardware: Hardware) -> None:
    """What makes the network smaller or faster, not other."""
    if hardware["activation_checkpointing"] is True:
        try:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(f"hardware.activation_checkpointing: {error}") from None
    if hardware["compile"]:
        for block in transformer_blocks(network):
            block.compile(dynamic=True)


def _encoded(config: Config, method: Method, rows: list[Row]) -> Sequence[Any]:
    """Training examples, kept between runs. What a method does to rows may depend on its own keys, not on the shared ones."""
    shared = inspect.signature(Method.__init__).parameters
    return stored(rows, method.encode, method.encoder, {k: v for k, v in config["method"].items() if k not in shared})


def _general(method: Method, keep: Retention) -> list[Example]:
    """Pieces of general text for the retention term; none when it is off."""
    return method.encode_text(general_texts(keep["text"]), keep["length"]) if method.retention_weight else []


def _rows_per_step(config: Config, method: Method) -> int:
    """Rows that a step draws: a prompt for each group of completions."""
    return max(config["global_batch_size"] // method.group_size, 1)


def steps_of_run(config: Config, steps_of_epoch: int) -> int:
    """Optimizer steps from those of an epoch, max_epochs and max_steps."""
    limits = []
    if config["max_epochs"] is not None:
        limits.append(math.ceil(config["max_epochs"] * steps_of_epoch))
    if config["max_steps"] is not None:
        limits.append(config["max_steps"])
    return min(limits)


class Layout(TypedDict):
    """How a step's rows are dealt out."""

    global_batch_size: int
    micro_batch_size: int
    seed: int
    rank: int
    world_size: int


def _layout(config: Config, resolved: Resolved, tokens: list[int]) -> Layout:
    """How a step's rows are dealt out; with micro_batch_size=auto a CPU takes as many as keep it busy and no more."""
    rows, most = config["global_batch_size"], resolved.micro_batch_size
    if resolved.machine.accelerator == "cpu":
        most = min(most, int(CPU_TOKENS / float(np.quantile(tokens, 0.9))))
    processes = resolved.machine.processes
    size = micro_batch(
        global_batch_size=rows, micro_batch_size=config["micro_batch_size"], processes=processes, most=most
    )
    rank = int(os.environ.get("RANK", 0))
    return {
        "global_batch_size": rows, "micro_batch_size": size, "seed": config["seed"], "rank": rank, "world_size": processes
    }  # fmt: skip


def _validation_batches(examples: list[Example], method: Method, layout: Layout) -> DataLoader | None:
    """This process's validation batches; all processes get the same number, the last ones without rows."""
    size, world_size = layout["micro_batch_size"], layout["world_size"]
    rounds = range(math.ceil(len(examples) / (size * world_size)))
    starts = [(k * world_size + layout["rank"]) * size for k in rounds]
    batches = [method.collate(examples[start : start + size]) for start in starts]
    # Its own generator: otherwise making an iterator would draw from the one that training draws from.
    return DataLoader(batches, batch_size=None, generator=torch.Generator()) if batches else None  # type: ignore[arg-type]
