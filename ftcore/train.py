"""One run from config to summary.json, to be read from top to bottom."""

import inspect
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from ftcore import report, sharding
from ftcore.activations import KeptActivations, keep_activations
from ftcore.adapter import transformer_blocks
from ftcore.base_scores import scores_file
from ftcore.callbacks import BeforeAfter, KeepBest, ProgressBar, RetentionGuard, StepMetrics, Watchdog, peak_memory_gb
from ftcore.cloze import gaps
from ftcore.config import build, locate
from ftcore.data import Data, Records
from ftcore.data.batches import TrainBatches
from ftcore.data.sources import Row, rows_of
from ftcore.data.store import lengths, stored
from ftcore.data.tokens import Encoder, Example
from ftcore.errors import ConfigError, DataError, OutOfMemory
from ftcore.evaluate import HeldOut
from ftcore.hardware import AUTO_ROWS, CPU_TOKENS, keep_freed_memory, micro_batch, smaller
from ftcore.ledger import Ledger
from ftcore.lock import made_with
from ftcore.loggers import JSONLines
from ftcore.methods.base import Method
from ftcore.model import parameter_counts, save_model
from ftcore.profiling import Profile
from ftcore.reference import ReferenceSums, base_name, reference_file
from ftcore.resources import home
from ftcore.resume import Checkpoints
from ftcore.testing import faults

Config = dict[str, Any]
TRAINER_DEFAULTS = {
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


@dataclass
class Job:
    """What a run works on: built by `prepare`, fitted by `run`."""

    method: Method
    records: Records
    batches: TrainBatches
    validation: DataLoader | None
    held_out: HeldOut


def run(config: Config, folder: Path, records: Records | None = None, start: Path | None = None) -> None:
    """Train, compare with the base model, save. Called in every process of the run; `start` is a checkpoint to go on from.

    Writes into `folder`: metrics.jsonl, checkpoints/, model/, samples.jsonl and, last, summary.json.
    """
    started = time.perf_counter()
    quiet()
    keep_freed_memory()
    job = prepare(config, records)
    if job.batches.rank == 0:
        report.plan(config, job.method, job.records, job.batches)
    if config["dry_run"]:
        return

    # The comparison runs at the fit's start and end, inside its processes.
    scores = folder / "base.json", scores_file(config, job.method, job.held_out)
    steps, compare = StepMetrics(), BeforeAfter(job.held_out, config["evaluate"], *scores)
    keeper = Checkpoints(folder, config["checkpoints"], job.batches, job.records)
    loggers: list[Any] = [JSONLines(folder)]
    if config["logger"] and job.batches.rank == 0:
        loggers.append(build(config["logger"], folder, config))
    machine = build(config["hardware"])
    if machine["strategy"] == "fsdp":
        machine["strategy"] = sharding.strategy(machine)
    trainer = lightning.Trainer(
        **machine,
        max_steps=job.batches.steps,
        max_epochs=1,  # one pass over batches that know the epochs themselves
        accumulate_grad_batches=job.batches.accumulation,
        val_check_interval=min(config["validate_every"] or job.batches.steps, job.batches.steps)
        * job.batches.accumulation,
        limit_val_batches=1.0 if job.validation and config["validate_every"] else 0,
        logger=loggers,
        callbacks=[
            steps,
            *_watching(config, folder, job),
            keeper,
            *([compare] if config["evaluate"]["enabled"] else []),
        ],
        use_distributed_sampler=False,
        default_root_dir=folder,
        **{**TRAINER_DEFAULTS, **config["trainer"]},
    )
    if start:
        keeper.resume(trainer, start)
    try:
        trainer.fit(job.method, job.batches, job.validation)
    except torch.OutOfMemoryError:
        raise OutOfMemory(out_of_memory(config, job.batches)) from None
    sharding.assemble(job.method.network)

    if trainer.is_global_zero:
        figures = _figures(job, steps, compare, started)  # before adapters are merged for saving
        save_model(job.method.foundation, folder / "model")
        samples = report.side_by_side(compare.base_answers, compare.tuned_answers)
        shown = {"samples": report.spread(samples, config["evaluate"]["samples"])}
        summary = {"name": config["name"], **compare.scores(), **figures, "made_with": made_with(config), **shown}
        write_lines(folder / "samples.jsonl", samples)
        write_json(folder / "summary.json", summary)
        report.finish(config, folder, summary, samples, loggers)


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
    return method.pieces(_texts(keep["text"]), keep["length"]) if method.retention_weight else []


def _pace(config: Config, method: Method) -> dict[str, int]:
    """Rows that a step draws, a prompt for each group of completions, and updates on them."""
    return {"rows_per_step": max(config["global_batch_size"] // method.group_size, 1), "updates": method.updates}


def _figures(job: Job, steps: StepMetrics, compare: BeforeAfter, started: float) -> Config:
    """What the run took."""
    trained, parameters = parameter_counts(job.method.network)
    return {
        "steps": job.method.trainer.global_step,
        "tokens": steps.tokens,
        "tokens_per_second": steps.tokens / max(steps.training_seconds, 1e-9),
        "seconds": time.perf_counter() - started,
        "seconds_training": steps.training_seconds,
        "seconds_comparing": compare.seconds,
        "peak_memory_gb": peak_memory_gb(),
        "parameters_trained": trained,
        "parameters": parameters,
        "processes": job.batches.world_size,
        "data_sha256": job.records.content_hash,
    }


def steps_of_run(config: Config, steps_of_epoch: int) -> int:
    """Optimizer steps from those of an epoch, max_epochs and max_steps."""
    limits = []
    if config["max_epochs"] is not None:
        limits.append(math.ceil(config["max_epochs"] * steps_of_epoch))
    if config["max_steps"] is not None:
        limits.append(config["max_steps"])
    return min(limits)


def load_held_out(config: Config, data: Data, method: Method, records: Records) -> HeldOut:
    """The rows that base and tuned model answer, sentences with a gap, and the general-text probe."""
    limit = config["evaluate"]["max_rows"]
    rows = records.test[:limit]
    cloze = gaps(data.cloze) if data.cloze else []
    probe = _texts(config["evaluate"]["probe"]) if config["evaluate"]["probe"] else []
    return HeldOut(rows, method.encode(rows), cloze, method.pieces(probe) if method.models_language else [])


def quiet() -> None:
    """Silence what the libraries print about themselves; their errors stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|torch|peft|transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def out_of_memory(config: Config, batches: TrainBatches) -> str:
    """What filled the memory, and what would fit, with the arithmetic."""
    rows, processes = batches.micro_batch_size, batches.world_size
    sizes = {"global_batch_size": batches.global_batch_size, "processes": processes}
    longest = max(lengths(batches.examples))
    message = f"The memory of a device is full with {rows} rows of up to {longest:,} tokens in a forward pass."
    if less := smaller(micro_batch_size=rows, **sizes):
        accumulation = batches.global_batch_size // (less * processes)
        message += (
            f" micro_batch_size={less} keeps every number: {batches.global_batch_size} = {less} x {processes} processes x "
            f"{accumulation} micro-batches."
        )
    return (
        f"{message} Less memory also takes hardware.activation_checkpointing=true, a smaller data.max_length or rank."
    )


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


def _watching(config: Config, folder: Path, job: Job) -> list[Any]:
    """Callbacks that look at the run, and those that a setting or the environment asks for."""
    found = [*_selection(config, folder, job.validation), *_guard(config, job), ProgressBar(leave=True)]
    if config["profile"]:
        found.append(Profile(folder, job.batches.steps, job.method.updates))
    if config["ledger"]:
        found.append(Ledger(folder, job.batches.rank))
    if config["hang_timeout"]:
        found.append(Watchdog(config["hang_timeout"]))
    return [*faults.asked_for(config["seed"]), *found]


def _selection(config: Config, folder: Path, validation: DataLoader | None) -> list[Any]:
    """Callbacks that choose the weights and stop early, by one metric."""
    key = config["keep_best"]
    if key == "last":
        return []
    if not validation:
        raise ConfigError(
            f"keep_best={key}, but there is no validation row: set data.validation_share=0.1 or a file of them."
        )
    return [KeepBest(folder, key, config["patience"])]


def _guard(config: Config, job: Job) -> list[Any]:
    """The callback that watches the probe, where a limit is set."""
    keep = config["retention"]
    if not keep["max_rise"]:
        return []
    if not job.held_out.probe:
        raise ConfigError(
            "retention.max_rise needs general text to look at and a model that predicts it: set evaluate.probe."
        )
    size = config["evaluate"]["batch_size"] // 4 or 1
    return [RetentionGuard(job.held_out.probe, keep["max_rise"], keep["check_every"], keep["action"], size)]


def _texts(path: str) -> list[dict[str, Any]]:
    rows = list(rows_of(path))
    if missing := [where for where, row in rows if not isinstance(row.get("text"), str)]:
        raise DataError(f"{missing[0]}: general text needs a column 'text'.")
    return [{"id": str(row.get("id", where)), "text": row["text"]} for where, row in rows]


def write_json(file: Path, content: Any) -> None:
    """Write one JSON document."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
