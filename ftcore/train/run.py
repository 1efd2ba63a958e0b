"""One run from config to summary.json, to be read from top to bottom."""

import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from ftcore.config.build import build
from ftcore.console import quiet
from ftcore.data import Records
from ftcore.data.steps import TrainBatches
from ftcore.data.token_cache import lengths
from ftcore.errors import ConfigError, OutOfMemory
from ftcore.evaluate.base_scores import scores_file
from ftcore.evaluate.tables import side_by_side, spread
from ftcore.machine.hardware import keep_freed_memory, smaller
from ftcore.machine.provenance import made_with
from ftcore.models import sharding
from ftcore.models.foundation import save_model
from ftcore.run_folder import Run
from ftcore.settings import Config, Resolved
from ftcore.train import faults, report
from ftcore.train.before_after import BeforeAfter
from ftcore.train.callbacks import KeepBest, ProgressBar, RetentionGuard, StepMetrics, Watchdog, peak_memory_gb
from ftcore.train.ledger import Ledger
from ftcore.train.loggers import JSONLines, check_installed
from ftcore.train.prepare import Job, prepare
from ftcore.train.profile import Profile
from ftcore.train.resume import Checkpoints

TRAINER_DEFAULTS = {
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


def run(
    config: Config, resolved: Resolved, run: Run, records: Records | None = None, start: Path | None = None
) -> None:
    """Train, compare with the base model, save. Called in every process of the run; `start` is a checkpoint to go on from.

    Writes metrics, checkpoints, model, samples and, last, the summary of `run`.
    """
    started = time.perf_counter()
    quiet()
    keep_freed_memory()
    if config["logger"]:
        check_installed(str(config["logger"]["_target_"]))  # before weights are loaded
    job = prepare(config, resolved, records)
    if job.batches.rank == 0:
        report.plan(config, job.method, job.records, job.batches)
    if config["dry_run"]:
        return

    # The comparison runs at the fit's start and end, inside its processes.
    shared = scores_file(config, resolved, job.method, job.held_out)
    steps, compare = StepMetrics(), BeforeAfter(job.held_out, config["evaluate"], run.base_scores, shared)
    keeper = Checkpoints(run, config["checkpoints"], job.batches, job.records)
    loggers = [JSONLines(run), *(_trackers(config, run) if job.batches.rank == 0 else [])]
    callbacks = [steps, *_watching(config, run, job), keeper, *([compare] if config["evaluate"]["enabled"] else [])]
    trainer = _trainer(config, resolved, run, job, loggers, callbacks)
    if start:
        keeper.resume(trainer, start)
    try:
        trainer.fit(job.method, job.batches, job.validation)
    except torch.OutOfMemoryError:
        raise OutOfMemory(out_of_memory(config, job.batches)) from None
    sharding.assemble(job.method.network)

    if trainer.is_global_zero:
        figures = _figures(job, steps, compare, started)  # before adapters are merged for saving
        save_model(job.method.foundation, run.model)
        samples = side_by_side(compare.base_answers, compare.tuned_answers)
        shown = {"samples": spread(samples, config["evaluate"]["samples"])}
        summary = {"name": config["name"], **compare.scores(), **figures, "made_with": made_with(config), **shown}
        run.finish(summary, samples)
        report.finish(config, run, summary, samples, loggers)


def _trackers(config: Config, run: Run) -> list[Logger]:
    """The loggers of the experiment tracker that the config names."""
    return build(config["logger"], list, run.folder, config) if config["logger"] else []


def _trainer(
    config: Config, resolved: Resolved, run: Run, job: Job, loggers: list[Logger], callbacks: list[Callback]
) -> lightning.Trainer:
    machine, steps, accumulation = resolved.machine, job.batches.steps, job.batches.accumulation
    strategy = {"single": "auto", "ddp": "ddp"}.get(machine.strategy) or sharding.strategy(machine)
    more: dict[str, Any] = {**TRAINER_DEFAULTS, **config["trainer"]}
    return lightning.Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=machine.num_nodes,
        strategy=strategy,
        precision=machine.precision,
        max_steps=steps,
        max_epochs=1,  # one pass over batches that know the epochs themselves
        accumulate_grad_batches=accumulation,
        val_check_interval=min(config["validate_every"] or steps, steps) * accumulation,
        limit_val_batches=1.0 if job.validation and config["validate_every"] else 0,
        logger=loggers,
        callbacks=callbacks,
        use_distributed_sampler=False,
        default_root_dir=run.folder,
        **more,
    )


def _figures(job: Job, steps: StepMetrics, compare: BeforeAfter, started: float) -> dict[str, object]:
    """What the run took."""
    network = job.method.network
    trained, parameters = network.num_parameters(only_trainable=True), network.num_parameters()
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


def _watching(config: Config, run: Run, job: Job) -> list[Callback]:
    """Callbacks that look at the run, and those that a setting or the environment asks for."""
    found = [*_selection(config, run, job.validation), *_guard(config, job), ProgressBar(leave=True)]
    if config["profile"]:
        found.append(Profile(run, job.batches.steps, job.method.updates))
    if config["ledger"]:
        found.append(Ledger(run, job.batches.rank))
    if config["hang_timeout"]:
        found.append(Watchdog(config["hang_timeout"]))
    return [*faults.asked_for(config["seed"]), *found]


def _selection(config: Config, run: Run, validation: DataLoader | None) -> list[Callback]:
    """Callbacks that choose the weights and stop early, by one metric."""
    key = config["keep_best"]
    if key == "last":
        return []
    if not validation:
        raise ConfigError(
            f"keep_best={key}, but there is no validation row: set data.validation_share=0.1 or a file of them."
        )
    return [KeepBest(run, key, config["patience"])]


def _guard(config: Config, job: Job) -> list[Callback]:
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
