"""What a person sees: the plan before training, the comparison after it, and what to type next."""

from math import ceil
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ftcore import ledger
from ftcore.data import Records
from ftcore.data.batches import TrainBatches
from ftcore.data.store import lengths
from ftcore.errors import is_private
from ftcore.evaluate import Scores, console
from ftcore.methods.base import Method
from ftcore.model import parameter_counts

Config = dict[str, Any]
# Score -> what it is called in the table and how it is written; `change` of a share is a difference, of others a ratio.
SCORES = {
    "loss": ("loss", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "accuracy": ("answer accuracy", "{:.1%}"),
    "cloze": ("missing word found among four", "{:.1%}"),
    "rewards/accuracies": ("pairs in the right order", "{:.1%}"),
    "rewards/margins": ("margin of rewards", "{:.3f}"),
    "rewards/chosen": ("reward of chosen", "{:.3f}"),
    "rewards/rejected": ("reward of rejected", "{:.3f}"),
    "logps/chosen": ("log-probability of chosen", "{:.2f}"),
    "logps/rejected": ("log-probability of rejected", "{:.2f}"),
    "reward": ("reward of sampled answers", "{:.3f}"),
    "reward_std": ("its standard deviation", "{:.3f}"),
    "probe_perplexity": ("perplexity on general text", "{:.2f}"),
}

# Characters of a sample that a table shows.
SHOWN = 240
STYLES = {True: "green", False: "red", None: ""}


def plan(config: Config, method: Method, records: Records, batches: TrainBatches) -> None:
    """Print what is about to run: rows, steps, parameters; with dry_run also what it needs in memory."""
    network, encoder = method.network, method.encoder
    trained, parameters = parameter_counts(network)
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
    if forged := encoder.forged(records.train):
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


def side_by_side(first: list[Config], second: list[Config]) -> list[Config]:
    """Both models' answers to the same rows; where rows are private only whether they are right."""
    return [
        {"id": a["id"], **_texts(a, b), "base_right": a["right"], "tuned_right": b["right"]}
        for a, b in zip(first, second, strict=True)
    ]


def _texts(a: Config, b: Config) -> Config:
    if "answer" not in a:
        return {}
    return {"prompt": a["prompt"], "expected": a["expected"], "base": a["answer"], "tuned": b["answer"]}


def comparison(base: Scores, tuned: Scores, names: tuple[str, str] = ("base", "tuned")) -> Table:
    """Table of both models' scores and the change."""
    table = Table(title=f"{tuned['rows']} held-out rows", title_justify="left")
    for column in ("", *names, "change"):
        table.add_column(column, justify="left" if not column else "right")
    for key, (label, form) in SCORES.items():
        a, b = base.get(key), tuned.get(key)
        if a is None or b is None:
            continue
        table.add_row(label, form.format(a), form.format(b), _change(a, b, form))
    return table


def _change(first: float, second: float, form: str) -> str:
    if form.endswith("%}"):
        return f"{second - first:+.1%}"
    return f"{second / first - 1:+.1%}" if first > 0 and second > 0 else f"{second - first:+.3f}"


def spread(rows: list[Config], count: int) -> list[Config]:
    """`count` rows at even distances, the first among them."""
    return rows[:: max(len(rows) // max(count, 1), 1)][:count]


def samples_table(samples: list[Config], count: int, names: tuple[str, str] = ("base", "tuned")) -> Table:
    """`count` answers side by side, spread over all rows, right ones in green."""
    if "prompt" not in samples[0]:
        return _rights_table(spread(samples, count), names)
    table = Table(show_lines=True)
    for column in ("prompt", "expected", *names):
        table.add_column(column, overflow="fold", ratio=1)
    for row in spread(samples, count):
        answers = (Text(_short(row[key]), style=STYLES[row[f"{key}_right"]]) for key in ("base", "tuned"))
        table.add_row(Text(_short(row["prompt"], end=True)), Text(_short(row["expected"])), *answers)
    return table


def _rights_table(samples: list[Config], names: tuple[str, str]) -> Table:
    """Which rows were answered rightly, without their text."""
    table, words = Table("id", *names), {True: "right", False: "wrong", None: "-"}
    for row in samples:
        table.add_row(
            Text(row["id"]), *(Text(words[row[key]], style=STYLES[row[key]]) for key in ("base_right", "tuned_right"))
        )
    return table


def _short(text: str, end: bool = False) -> str:
    """The first characters of a long text, or the last ones; samples.jsonl has all of it."""
    if len(text) <= SHOWN:
        return text
    return f"... {text[-SHOWN:]}" if end else f"{text[:SHOWN]} ..."


def finish(config: Config, folder: Path, summary: Config, samples: list[Config], loggers: list[Any]) -> None:
    """Print the comparison and where things are; send the same to the experiment tracker."""
    if summary["tuned"]:
        console.print(comparison(summary["base"], summary["tuned"]))
        if samples and config["evaluate"]["samples"]:
            console.print(samples_table(samples, config["evaluate"]["samples"]))
    for logger in loggers:
        if hasattr(logger, "log_table"):
            _log_to_wandb(logger, folder, summary, samples)
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    folder = folder.with_name(folder.name.removesuffix(".partial"))  # a stage, which gets its name next
    console.print(f"Done in {minutes} min {seconds} s. Everything is in {folder}", soft_wrap=True)
    if samples:
        console.print(f"Next: python -m ftcore chat run={folder}", soft_wrap=True, highlight=False)


def _log_to_wandb(logger: Any, folder: Path, summary: Config, samples: list[Config]) -> None:
    """Send what is known at the end. The run is whole without it, so a server that is gone costs a minute and a note."""
    from ftcore.loggers import wandb_files, wandb_hint

    try:
        hint = wandb_hint(logger)
        try:
            _tables(logger, folder, summary, samples)
            logger.experiment.summary.update(summary)
        finally:
            logger.experiment.finish()  # the steps arrive even if a table does not
    except Exception as error:  # of wandb, requests or its service: there is no common class
        hint = (
            f"W&B did not take the end of this run ({type(error).__name__}); all of it is in {folder}. When the server is back, "
            f"upload the steps with: wandb sync {wandb_files(logger)}"
        )
    console.print(hint, soft_wrap=True, highlight=False)


def _tables(logger: Any, folder: Path, summary: Config, samples: list[Config]) -> None:
    if summary["tuned"]:
        rows = [[key, summary["base"][key], summary["tuned"][key]] for key in SCORES if key in summary["tuned"]]
        logger.log_table("before_after", columns=["score", "base", "tuned"], data=rows)
        if is_private():
            return
        columns = list(samples[0]) if samples else []
        logger.log_table("samples", columns=columns, data=[[row[c] for c in columns] for row in samples[:100]])
    if (folder / ledger.FILE).is_file():
        rows = [list(row.values()) for row in ledger.hardest(folder, ledger.SENT)]
        logger.log_table("ledger", columns=[*ledger.COLUMNS, "first_loss"], data=rows)
