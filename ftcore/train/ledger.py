"""What every row did: its loss each time it was trained on. The hardest rows are the likely mistakes in the data."""

import json
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch import Callback
from rich.table import Table
from rich.text import Text

from ftcore.data.sources import Row
from ftcore.errors import ConfigError, StorageError
from ftcore.methods.base import Method
from ftcore.run_folder import Run, keep_lines

COLUMNS = ("step", "epoch", "id", "loss", "trained_tokens", "truncated")
# Rows that a table shows, and that the experiment tracker gets.
SHOWN, SENT = 20, 1000


class Ledger(Callback):
    """Writes a line for each row of each step, every process its own file, and one Parquet file of all when training ends."""

    def __init__(self, run: Run, rank: int) -> None:
        self.run, self.lines = run, run.ledger_part(rank)

    def keep_until(self, step: int) -> None:
        """Forget what was written after `step`: a run that goes on writes it again."""
        keep_lines(self.lines, lambda written: written <= step)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, method: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Append the rows of a micro-batch."""
        step = batch_idx // trainer.accumulate_grad_batches + 1
        rows = zip(batch["ids"], method.row_losses, batch["row_sizes"], strict=True)
        with self.lines.open("a", encoding="utf-8") as lines:
            for id, loss, size in rows:
                lines.write(json.dumps([step, batch["epoch"], id, loss, *size]) + "\n")

    def on_train_end(self, trainer: Trainer, method: Method) -> None:  # type: ignore[override]
        """Put the processes' lines together, in the order of the steps."""
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = sorted(self.run.folder.glob(self.run.ledger_part("*").name))
            rows = [json.loads(line) for part in parts for line in part.open(encoding="utf-8")]
            _write(self.run.ledger, sorted(rows, key=lambda row: row[0]))
            for part in parts:
                part.unlink()


def _write(file: Path, rows: list[list[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = zip(*rows, strict=True) if rows else [[] for _ in COLUMNS]
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(COLUMNS, map(list, columns), strict=True))), file)


def hardest(run: Run, count: int) -> list[Row]:
    """The `count` rows whose loss was highest when they were last trained on, with their first loss as `first_loss`.

    Raises `ConfigError` when the run kept no ledger.
    """
    import pyarrow.parquet

    if not run.ledger.is_file():
        raise ConfigError(f"{run} has no {run.ledger.name}: train with ledger=true to keep one.")
    last: dict[str, Row] = {}
    try:
        rows = pyarrow.parquet.read_table(run.ledger, columns=list(COLUMNS)).to_pylist()
    except (pyarrow.ArrowException, ValueError):
        raise StorageError(f"{run.ledger} cannot be read as a ledger.") from None
    for row in rows:  # in the order of the steps
        first = last.get(row["id"], {"first_loss": row["loss"]})["first_loss"]
        last[row["id"]] = {**row, "first_loss": first}
    return sorted(last.values(), key=lambda row: -row["loss"])[:count]


def hardest_table(run: Run, texts: dict[str, str]) -> Table:
    """The rows with the highest loss, with the beginning of their text."""
    title = "rows with the highest loss when last trained on: mistakes in the data are among them"
    table = Table(title=title, title_justify="left")
    for column in ("row", "loss at first", "at last", "tokens", "text"):
        table.add_column(column, justify="right" if "l" in column and column != "row" else "left", overflow="fold")
    for row in hardest(run, SHOWN):
        tokens = f"{row['trained_tokens']}{' cut' if row['truncated'] else ''}"
        losses = (f"{row['first_loss']:.3f}", f"{row['loss']:.3f}")
        table.add_row(Text(row["id"]), *losses, tokens, Text(texts.get(row["id"], "")))
    return table
