"""What a person sees: the plan before training, the comparison after it, and what to type next."""

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from rich.table import Table
from rich.text import Text

from ftcore.config.tree import flatten
from ftcore.console import console, plain, typed, wide_console
from ftcore.data.shown import as_read
from ftcore.data.sources import Row
from ftcore.data.steps import steps_of_epoch
from ftcore.data.token_cache import lengths
from ftcore.errors import is_private
from ftcore.evaluate.tables import SCORES, comparison, samples_table
from ftcore.run_folder import Run
from ftcore.settings import Config
from ftcore.train import ledger
from ftcore.train.loggers import wandb_hint, wandb_sync
from ftcore.train.prepare import Job

FIRST = 4  # rows of the first batch that are kept to be shown


def plan(config: Config, job: Job) -> None:
    """Print what is about to run: rows, steps, parameters."""
    network, encoder, records, batches = job.method.network, job.method.encoder, job.records, job.batches
    trained, parameters = network.num_parameters(only_trainable=True), network.num_parameters()
    sizes = sorted(lengths(batches.examples))
    sample = [batches.examples[k] for k in range(0, len(sizes), ceil(len(sizes) / 1000))]  # about a thousand are enough
    loss_tokens = sum(sum(getattr(example, "completion_mask", [])) for example in sample)
    with_loss = f"; {loss_tokens / sum(map(len, sample)):.0%} with loss" if loss_tokens else ""
    counts = f"{len(records.train):,} train, {len(records.validation):,} validation, {len(records.test):,} held out"
    split = f"{batches.accumulation} x {batches.world_size} processes x {batches.micro_batch_size}"
    lines = [
        ("rows", counts),
        ("tokens per row", f"median {sizes[len(sizes) // 2]}, longest {sizes[-1]}{with_loss}"),
        ("parameters", f"{trained:,} of {parameters:,} train ({trained / parameters:.2%})"),
        ("steps", f"{batches.steps:,} of {batches.global_batch_size} rows = {split}"),
        *(("notice", note) for note in [*records.notes, *encoder.notes(), *_odd(config, job)]),
    ]
    if forged := encoder.spelling_control_tokens(records.train):
        first = forged[0]["where"]
        lines.append(("control tokens", f"{len(forged):,} rows spell one; it stays text (the first: {first})"))
    for reason, count in encoder.counts.items():
        lines.append(("rows", f"{count:,} {reason} ({encoder.limit})"))
    table = Table(show_header=False, box=None, title=config["name"], title_justify="left", title_style="bold")
    for name, text in lines:
        table.add_row(name, Text(text))
    console.print(table)


def beginning(job: Job) -> dict[str, object]:
    """The number of steps and the first rows of the first step as the model reads them; of private rows their ids."""
    batches = job.batches
    per_step = batches.rows_per_step or batches.global_batch_size
    first = steps_of_epoch(lengths(batches.examples), per_step, batches.seed, 0)[0]
    shown = as_read(job.method.encoder.tokenizer, [batches.examples[k] for k in first[:FIRST]])  # type: ignore[misc]
    return {"steps": batches.steps, "rows": len(first), "first_batch": shown}


def _odd(config: Config, job: Job) -> Iterator[str]:
    """What may be meant so, and seldom is."""
    steps, rows, lr = job.batches.steps, len(job.batches.examples), job.method.lr
    if not job.records.test:
        advice = "set data.test_share=0.2, or name a file of them with data.splits.test"
        yield f"no row is held out, so base and tuned model are not compared on any: {advice}"
    if lr > 1:
        yield f"method.lr={lr:g}: steps of this size destroy what the model knows; 1e-5 to 1e-3 are usual"
    if (most := job.batches.rows_per_step or 0) > rows:
        yield f"there are {rows:,} training rows, so no step has {most:,}: each step takes all"
    if config["validate_every"] and not job.records.validation:
        yield "validate_every is set and there are no validation rows: set data.validation_share=0.1, or name a file of them"
    elif (every := config["validate_every"]) and every > steps:
        yield f"validate_every={every:,} is beyond the last of {steps:,} steps: validation comes once, after it"
    if (every := config["checkpoints"]["every"]) and every > steps:
        yield f"checkpoints.every={every:,} is beyond the last of {steps:,} steps: only a signal writes a checkpoint"


def finish(config: Config, run: Run, summary: dict[str, Any], samples: list[Row], loggers: list[Logger]) -> None:
    """Print the comparison and where things are. Send the same to the experiment tracker."""
    shown = config["evaluate"]["samples"]
    if summary["tuned"]:
        wide_console().print(comparison(summary["base"], summary["tuned"], summary["intervals"]))
        if samples and shown:
            console.print(samples_table(samples, shown))
    for logger in loggers:
        hint = ""
        if isinstance(logger, WandbLogger):
            hint = _log_to_wandb(logger, run, summary, samples)
        elif hasattr(logger, "log_summary"):
            hint = logger.log_summary(scalars(summary), summary["steps"])
        if hint:
            plain.print(hint.replace(run.folder.name, run.name))
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    ended = "Ended" if "failure" in summary else "Done"
    console.print(f"{ended} in {minutes} min {seconds} s. Everything is in {run.final_folder}", soft_wrap=True)
    if samples:
        plain.print(f"Next: {typed('python', '-m', 'ftcore', 'chat', f'run={run.final_folder}')}")


def scalars(summary: Mapping[str, object]) -> dict[str, float]:
    """Every number of summary.json by its path.

    >>> scalars({"name": "run", "tuned": {"loss": 1.5, "rows": 4}})
    {'tuned/loss': 1.5, 'tuned/rows': 4.0}
    """
    return {path.replace(".", "/"): float(value) for path, value in flatten(summary) if isinstance(value, int | float)}


def _log_to_wandb(logger: WandbLogger, run: Run, summary: dict[str, Any], samples: list[Row]) -> str:
    """Send tables and summary. The run is complete without them: if the server is gone, a note says how to upload later."""
    try:
        hint = wandb_hint(logger)
        try:
            _log_tables(logger, run, summary, samples)
            logger.experiment.summary.update(summary)
        finally:
            logger.experiment.finish()  # the steps arrive even if a table does not
        return hint
    except Exception as error:  # of wandb, requests or its service: they have no common class
        return (
            f"W&B did not take the end of this run ({type(error).__name__}); all of it is in {run}. When the server is back, "
            f"upload the steps with: {wandb_sync(logger)}"
        )


def _log_tables(logger: WandbLogger, run: Run, summary: dict[str, Any], samples: list[Row]) -> None:
    if summary["tuned"]:
        base, tuned, differences = summary["base"], summary["tuned"], summary["intervals"]
        columns = ["low", "high", "verdict"]
        rows = [
            [key, base[key], tuned[key], *map(differences.get(key, {}).get, columns)] for key in SCORES if key in tuned
        ]
        logger.log_table("before_after", columns=["score", "base", "tuned", *columns], data=rows)
        if is_private():
            return
        columns = list(samples[0]) if samples else []
        logger.log_table("samples", columns=columns, data=[[row[c] for c in columns] for row in samples[:100]])
    if run.ledger.is_file():
        rows = [list(row.values()) for row in ledger.hardest(run, ledger.SENT)]
        logger.log_table("ledger", columns=[*ledger.COLUMNS, "first_loss"], data=rows)
