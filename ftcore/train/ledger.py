"""The ledger: the loss of every row each time it was trained on. Rows of high loss may be mistakes in the data."""

import json
from typing import Any

from lightning import Trainer
from lightning.pytorch import Callback
from rich.table import Column, Table
from rich.text import Text

from ftcore.data.sources import Row
from ftcore.errors import ConfigError, StorageError
from ftcore.methods.base import Method
from ftcore.run_folder import Run, keep_lines

COLUMNS = ("step", "epoch", "id", "loss", "trained_tokens", "truncated")
# Rows that the table shows, and that are sent to the experiment tracker.
SHOWN, SENT = 20, 1000


class Ledger(Callback):
    """Writes a line for each row of each step. Every process has its own file; they become one Parquet file at the end."""

    def __init__(self, run: Run, rank: int) -> None:
        self.run, self.lines, self.rows = run, run.ledger_part(rank), list[tuple[int, str, int, bool]]()

    def keep_until(self, step: int) -> None:
        """Delete the lines after `step`: a resumed run writes them again."""
        keep_lines(self.lines, lambda written: written <= step)

    def on_train_batch_end(self, trainer: Trainer, method: Method, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Append the rows of a step when it is complete."""
        self.rows += [(batch["epoch"], id, *size) for id, size in zip(batch["ids"], batch["row_sizes"], strict=True)]
        step, left = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        if left:
            return
        with self.lines.open("a", encoding="utf-8") as lines:
            for (epoch, id, *size), loss in zip(self.rows, method.row_losses, strict=True):
                lines.write(json.dumps([step, epoch, id, loss, *size]) + "\n")
        self.rows = []

    def on_train_end(self, trainer: Trainer, method: Method) -> None:
        """Merge the files of all processes, sorted by step."""
        import pyarrow
        import pyarrow.parquet

        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = sorted(self.run.folder.glob(self.run.ledger_part("*").name))
            rows = [json.loads(line) for part in parts for line in part.open(encoding="utf-8")]
            rows.sort(key=lambda row: row[0])
            columns = {name: [row[k] for row in rows] for k, name in enumerate(COLUMNS)}
            pyarrow.parquet.write_table(pyarrow.table(columns), self.run.ledger)
            for part in parts:
                part.unlink()


def hardest(run: Run, count: int) -> list[Row]:
    """The `count` rows with the highest loss when last trained on, with their first loss as `first_loss`.

    Raises `ConfigError` when the run has no ledger, `StorageError` when it cannot be read.
    """
    import pyarrow.parquet

    if not run.ledger.is_file():
        raise ConfigError(f"{run} has no {run.ledger.name}: train with ledger=true to keep one.")
    try:
        rows: list[Row] = pyarrow.parquet.read_table(run.ledger, columns=list(COLUMNS)).to_pylist()
    except (pyarrow.ArrowException, ValueError):
        raise StorageError(f"{run.ledger} cannot be read as a ledger.") from None
    last = {row["id"]: row for row in rows}  # they are sorted by step
    first = {row["id"]: row["loss"] for row in reversed(rows)}
    hardest = sorted(last.values(), key=lambda row: -row["loss"])[:count]
    return [{**row, "first_loss": first[row["id"]]} for row in hardest]


def hardest_table(rows: list[Row]) -> Table:
    """A table of what `hardest` found, each row with the beginning of its `text`."""
    first, last = (Column(name, justify="right", overflow="fold") for name in ("first loss", "last loss"))
    others = [Column(name, overflow="fold") for name in ("row", "tokens", "text")]
    title = "rows with the highest loss when last trained on: they may be mistakes in the data"
    table = Table(others[0], first, last, *others[1:], title=title, title_justify="left")
    for row in rows:
        tokens = f"{row['trained_tokens']}{' cut' if row['truncated'] else ''}"
        losses = (f"{row['first_loss']:.3f}", f"{row['loss']:.3f}")
        table.add_row(Text(row["id"]), *losses, tokens, Text(row["text"]))
    return table
