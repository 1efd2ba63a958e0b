"""What a person sees: the plan before training, the comparison after it, and what to type next."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from rich.table import Table
from rich.text import Text

from ftcore.console import console
from ftcore.data import Records
from ftcore.data.sources import Row
from ftcore.data.steps import TrainBatches
from ftcore.data.token_cache import lengths
from ftcore.errors import is_private
from ftcore.evaluate.tables import SCORES, comparison, samples_table
from ftcore.methods.base import Method
from ftcore.run_folder import Run
from ftcore.settings import Config
from ftcore.train import ledger


def plan(config: Config, method: Method, records: Records, batches: TrainBatches) -> None:
    """Print what is about to run: rows, steps, parameters; with dry_run also what it needs in memory."""
    network, encoder = method.network, method.encoder
    trained, parameters = network.num_parameters(only_trainable=True), network.num_parameters()
    sizes = sorted(lengths(batches.examples))
    shown = [
        batches.examples[k] for k in range(0, len(sizes), ceil(len(sizes) / 1000))
    ]  # a thousand say it well enough
    loss_tokens = sum(sum(getattr(example, "completion_mask", [])) for example in shown)
    with_loss = f"; {loss_tokens / sum(map(len, shown)):.0%} with loss" if loss_tokens else ""
    table = Table(show_header=False, box=None, title=config["name"], title_justify="left", title_style="bold")
    table.add_row(
        "rows", f"{len(records.train):,} train, {len(records.validation):,} validation, {len(records.test):,} held out"
    )
    table.add_row("tokens per row", f"median {sizes[len(sizes) // 2]}, longest {sizes[-1]}{with_loss}")
    table.add_row("parameters", f"{trained:,} of {parameters:,} train ({trained / parameters:.2%})")
    split = f"{batches.accumulation} x {batches.world_size} processes x {batches.micro_batch_size}"
    table.add_row("steps", f"{batches.steps:,} of {batches.global_batch_size} rows = {split}")
    for note in records.notes:
        table.add_row("notice", Text(note))
    if forged := encoder.spelling_control_tokens(records.train):
        table.add_row(
            "control tokens", f"{len(forged):,} rows spell one; it stays text (the first: {forged[0]['where']})"
        )
    for reason, count in encoder.counts.items():
        table.add_row("rows", f"{count:,} {reason} (data.max_length={encoder.max_length})")
    if config["dry_run"]:
        table.add_row("memory", f"at least {memory_estimate_gb(network, batches, sizes[-1]):.1f} GB per process")
    console.print(table)


def memory_estimate_gb(network: Any, batches: TrainBatches, longest: int) -> float:
    """Lower estimate of the memory of training, 10^9 bytes: weights, gradients, AdamW's two moments, activations.

    Activations per token and block: about 34 hidden sizes of numbers (Korthikanti et al., arXiv:2205.05198, without the
    attention matrix, which fused attention does not keep).
    """
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    text = network.config.get_text_config()
    activations = 34 * text.hidden_size * text.num_hidden_layers * batches.micro_batch_size * longest * 2
    return (weights + 3 * trained + activations) / 1e9


def finish(config: Config, run: Run, summary: dict[str, Any], samples: list[Row], loggers: list[Any]) -> None:
    """Print the comparison and where things are; send the same to the experiment tracker."""
    if summary["tuned"]:
        console.print(comparison(summary["base"], summary["tuned"]))
        if samples and config["evaluate"]["samples"]:
            console.print(samples_table(samples, config["evaluate"]["samples"]))
    for logger in loggers:
        if hint := _log_end(logger, run, summary, samples):
            hint = hint.replace(str(run), str(run.final_folder))
            console.print(hint, soft_wrap=True, highlight=False)
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    console.print(f"Done in {minutes} min {seconds} s. Everything is in {run.final_folder}", soft_wrap=True)
    if samples:
        console.print(f"Next: python -m ftcore chat run={run.final_folder}", soft_wrap=True, highlight=False)


def scalars(summary: Mapping[str, Any]) -> dict[str, float]:
    """Every number of summary.json by its path.

    >>> scalars({"name": "run", "tuned": {"loss": 1.5, "rows": 4}})
    {'tuned/loss': 1.5, 'tuned/rows': 4.0}
    """
    found: dict[str, float] = {}
    for key, value in summary.items():
        if isinstance(value, dict):
            found |= {f"{key}/{below}": number for below, number in scalars(value).items()}
        elif isinstance(value, int | float):
            found[key] = float(value)
    return found


def _log_end(logger: Any, run: Run, summary: dict[str, Any], samples: list[Row]) -> str:
    """Send what is known at the end; where it can be seen, or nothing."""
    if hasattr(logger, "log_table"):
        return _log_to_wandb(logger, run, summary, samples)
    return logger.log_summary(scalars(summary), summary["steps"]) if hasattr(logger, "log_summary") else ""


def _log_to_wandb(logger: Any, run: Run, summary: dict[str, Any], samples: list[Row]) -> str:
    """Send what is known at the end. The run is whole without it, so a server that is gone costs a minute and a note."""
    from ftcore.train.loggers import wandb_files, wandb_hint

    try:
        hint = wandb_hint(logger)
        try:
            _tables(logger, run, summary, samples)
            logger.experiment.summary.update(summary)
        finally:
            logger.experiment.finish()  # the steps arrive even if a table does not
    except Exception as error:  # of wandb, requests or its service: there is no common class
        return (
            f"W&B did not take the end of this run ({type(error).__name__}); all of it is in {run}. When the server is back, "
            f"upload the steps with: wandb sync {wandb_files(logger)}"
        )
    return hint


def _tables(logger: Any, run: Run, summary: dict[str, Any], samples: list[Row]) -> None:
    if summary["tuned"]:
        rows = [[key, summary["base"][key], summary["tuned"][key]] for key in SCORES if key in summary["tuned"]]
        logger.log_table("before_after", columns=["score", "base", "tuned"], data=rows)
        if is_private():
            return
        columns = list(samples[0]) if samples else []
        logger.log_table("samples", columns=columns, data=[[row[c] for c in columns] for row in samples[:100]])
    if run.ledger.is_file():
        rows = [list(row.values()) for row in ledger.hardest(run, ledger.SENT)]
        logger.log_table("ledger", columns=[*ledger.COLUMNS, "first_loss"], data=rows)
