"""One run from config to summary.json, to be read from top to bottom."""

import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback
from lightning.pytorch.loggers import Logger

from ftcore.config.build import build
from ftcore.console import quiet
from ftcore.data import Records
from ftcore.data.token_cache import lengths
from ftcore.errors import ConfigError, NumericalError, OutOfMemory
from ftcore.evaluate.base_scores import scores_file
from ftcore.evaluate.tables import side_by_side, spread
from ftcore.machine.hardware import keep_freed_memory, smaller, use_own_device
from ftcore.machine.provenance import made_with
from ftcore.models import sharding
from ftcore.models.base_name import base_of
from ftcore.models.precision import forbid_tf32, of_trainer
from ftcore.models.saving import save_model
from ftcore.run_folder import Run
from ftcore.settings import Config, Resolved
from ftcore.train import faults, report
from ftcore.train.before_after import BeforeAfter, is_finite
from ftcore.train.callbacks import KeepBest, ProgressBar, RetentionGuard, StepMetrics, Watchdog, peak_memory_gb
from ftcore.train.card import model_card
from ftcore.train.ledger import Ledger
from ftcore.train.loggers import JSONLines, check_installed
from ftcore.train.origin import origin
from ftcore.train.prepare import Job, prepare
from ftcore.train.profile import Profile
from ftcore.train.resume import Checkpoints

# What config key `trainer` may change.
TRAINER_DEFAULTS = {
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


def run(
    config: Config, resolved: Resolved, run: Run, records: Records | None = None, start: Path | None = None
) -> None:
    """Train, compare with the base model, save. Called in every process of the run; `start` is a checkpoint to resume from.

    Writes metrics, checkpoints, model, samples and, last, the summary of `run`.
    """
    started = time.perf_counter()
    quiet()
    keep_freed_memory()
    use_own_device(resolved.machine)
    forbid_tf32()
    if config["logger"]:
        check_installed(str(config["logger"]["_target_"]))  # before weights are loaded
    job = prepare(config, resolved, records)
    first_process = job.batches.rank == 0
    if first_process:
        report.plan(config, job)
    if config["dry_run"]:
        return
    if first_process:
        run.begin(report.beginning(job))
    made_from = origin(config, run) if first_process else {}  # now: votes go on to come in

    # The comparison runs at the fit's start and end, inside its processes.
    cache = scores_file(config, resolved, job.method, job.held_out)
    steps, compare = StepMetrics(), BeforeAfter(job.held_out, config["evaluate"], run.base_scores, cache)
    checkpoints = Checkpoints(run, config["checkpoints"], job.batches, job.records)
    callbacks = [steps, *_optional_callbacks(config, run, job, steps), checkpoints]
    loggers: list[Logger] = [JSONLines(run)]
    if config["logger"] and first_process:
        loggers += build(config["logger"], list, run.folder, config)
    if config["evaluate"]["enabled"]:
        callbacks.append(compare)
    trainer = _trainer(config, resolved, run, job, loggers, callbacks)
    if start:
        checkpoints.resume(trainer, start)
    try:
        trainer.fit(job.method, job.batches, job.validation)
    except torch.OutOfMemoryError:
        raise OutOfMemory(_out_of_memory(job)) from None
    finally:
        checkpoints.restore_handlers()
    figures = _figures(job, steps, compare, started, resolved.planned_gb)
    _end(config, run, job, compare, figures | made_from, loggers)
    if failure := _failure(job, compare):
        raise NumericalError(failure)


def _end(
    config: Config, run: Run, job: Job, compare: BeforeAfter, figures: dict[str, object], loggers: list[Logger]
) -> None:
    """Save the model, which takes all processes; the first writes and reports what the run gave."""
    samples, failure = side_by_side(compare.base.answers, compare.tuned.answers), _failure(job, compare)
    shown = spread(samples, config["evaluate"]["samples"])
    head = {"name": config["name"], **compare.scores(), **figures, **({"failure": failure} if failure else {})}
    summary = {**head, "made_with": made_with(config), "samples": shown}
    foundation, base = job.method.foundation, base_of(config["model"])
    save_model(foundation, run.model, base, model_card(config, summary, foundation, base))
    if job.batches.rank == 0:
        run.finish(summary, samples, compare.tuned.by_row)
        report.finish(config, run, summary, samples, loggers)


def _failure(job: Job, compare: BeforeAfter) -> str:
    """Why the run is not a good one although it came to its end; "" when it is."""
    skipped, steps = job.method.bad_steps, job.method.trainer.global_step
    if skipped:
        return f"The last {skipped} of {steps} steps were skipped: they were not finite. Lower method.lr, or look at their rows."
    if not is_finite(compare.tuned.scores):
        return "The tuned model's scores are not finite. Lower method.lr; the base model's weights are as they were."
    return ""


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
        precision=of_trainer(machine.precision),
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


def _figures(
    job: Job, steps: StepMetrics, compare: BeforeAfter, started: float, planned_gb: float | None
) -> dict[str, object]:
    """Steps, tokens, time, memory and sizes of the run."""
    return {
        "steps": job.method.trainer.global_step,
        "tokens": steps.tokens,
        "tokens_per_second": steps.tokens / max(steps.training_seconds, 1e-9),
        "seconds": time.perf_counter() - started,
        "seconds_training": steps.training_seconds,
        "seconds_comparing": compare.seconds,
        "peak_memory_gb": peak_memory_gb(),
        **({"planned_memory_gb": planned_gb} if planned_gb else {}),
        "parameters_trained": job.method.network.num_parameters(only_trainable=True),
        "parameters": job.method.network.num_parameters(),
        "processes": job.batches.world_size,
        "data_rows": len(job.records.train),
        "data_sha256": job.records.content_hash,
    }


def _out_of_memory(job: Job) -> str:
    """A message that says what filled the memory and, with the arithmetic, what would fit."""
    rows, size, processes = job.batches.micro_batch_size, job.batches.global_batch_size, job.batches.world_size
    longest = max(lengths(job.batches.examples))
    message = f"The memory of a device is full with {rows} rows of up to {longest:,} tokens in a forward pass."
    if less := smaller(global_batch_size=size, micro_batch_size=rows, processes=processes):
        product = f"{size} = {less} x {processes} processes x {size // (less * processes)} micro-batches"
        message += f" micro_batch_size={less} keeps every number: {product}."
    advice = "hardware.activation_checkpointing=true, a smaller data.max_length or a smaller rank"
    return f"{message} It also takes less memory to set {advice}."


def _optional_callbacks(config: Config, run: Run, job: Job, steps: StepMetrics) -> list[Callback]:
    """The callbacks that a setting or the environment asks for, in their order. Raises `ConfigError` for one without rows."""
    best, retention = config["keep_best"], config["retention"]
    if best != "last" and not job.validation:
        raise ConfigError(
            f"keep_best={best}, but there is no validation row: set data.validation_share=0.1 or a file of them."
        )
    if retention["max_rise"] and not job.held_out.probe:
        raise ConfigError("retention.max_rise needs general text and a model that predicts it: set evaluate.probe.")
    callbacks = [
        *faults.requested(config["seed"]),
        best != "last" and KeepBest(run, best, config["patience"]),
        retention["max_rise"] and RetentionGuard(job.held_out.probe, retention, config["evaluate"]["batch_size"]),
        ProgressBar(steps),
        config["profile"] and Profile(run, job.batches.steps, job.method.updates),
        config["ledger"] and Ledger(run, job.batches.rank),
        config["hang_timeout"] and Watchdog(config["hang_timeout"]),
    ]
    return [callback for callback in callbacks if isinstance(callback, Callback)]
