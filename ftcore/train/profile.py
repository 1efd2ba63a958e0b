"""`profile=true`: where the time of a step goes, as a table of one page and a Chrome trace.

Watched are the steps of one call of `prepare` after the first ones, from the end of the step before, so that data, rollouts and
rewards are in it. Floating-point operations are those of matrix products; utilisation is their share of what this device does in
one second of a large matrix product in the same precision.
"""

import math
import statistics
from typing import Any

import torch
from lightning import Callback, Trainer
from rich.console import Console
from rich.table import Table

from ftcore.kernels.matmul import times
from ftcore.run_folder import Run
from ftcore.timing import Watch, settled_time, watches

# Parts of a step in the order of the table. `head`: log-probabilities from hidden states, wherever they are asked for.
PARTS = ("data", "rollout", "reward", "forward", "head", "backward", "optimizer")
# Side of the square matrices whose product is the peak.
SIDE = 2048


class Profile(Callback):
    """Watches the steps after the first ones and writes profile.txt and profile.json, a Chrome trace."""

    def __init__(self, run: Run, steps: int, updates: int) -> None:
        first = -(-2 // updates) * updates  # the first steps are slower
        self.run, self.first = run, max(min(first, steps - updates), 0)
        self.steps, self.done = min(updates, steps), False
        self.tracer = torch.profiler.profile(with_flops=True, record_shapes=True)

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:  # type: ignore[override]
        """Begin with the run when it is short."""
        self._begin_or_end(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        """Data are there."""
        self._switch("forward")

    def on_before_backward(self, *_: Any) -> None:
        """The loss is there."""
        self._switch("backward")

    def on_after_backward(self, *_: Any) -> None:
        """The gradient is there."""
        self._switch("optimizer")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # type: ignore[override]
        """The step is done, or its next micro-batch is due."""
        self._switch("data")
        self._begin_or_end(trainer)

    def _switch(self, name: str) -> None:
        if watches:
            watches[-1].switch(name)

    def _begin_or_end(self, trainer: Trainer) -> None:
        if trainer.global_step == self.first and not watches and not self.done:
            self.tracer.start()
            watches.append(Watch())
        elif trainer.global_step == self.first + self.steps and watches:
            watch = watches.pop()
            self.tracer.stop()
            self.done = True
            if trainer.is_global_zero:
                self._write(watch.seconds, trainer.precision)

    def _write(self, seconds: dict[str, float], precision: str) -> None:
        self.tracer.export_chrome_trace(str(self.run.profile_trace))
        operations = sum(map(_operations, self.tracer.key_averages(group_by_input_shape=True))) / self.steps
        table = _table({name: value / self.steps for name, value in seconds.items()})
        rate, most = operations * self.steps / sum(seconds.values()) / 1e9, peak(precision) / 1e9
        used = f"{operations / 1e9:,.0f} GFLOP in matrix products, {rate:,.0f} GFLOP/s: "
        used += f"{rate / most:.0%} of the {most:,.0f} of a large one."
        with self.run.profile_table.open("w", encoding="utf-8") as file:
            Console(file=file, width=120).print(table, used)
        Console(soft_wrap=True, highlight=False).print(table, used)


def _operations(event: Any) -> float:
    """Floating-point operations of the calls of one kind and shape: torch counts its own products, not those by oneDNN."""
    if event.key != "mkldnn::_linear_pointwise":
        return float(event.flops)
    rows, weight = event.input_shapes[:2]
    return 2.0 * event.count * math.prod(rows) * weight[0]


def peak(precision: str) -> float:
    """Floating-point operations in a second of a large matrix product on this device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16 if "bf16" in precision else torch.float32)
    seconds = []
    for _ in range(6):
        start = settled_time()
        times(matrix, matrix)
        seconds.append(settled_time() - start)
    return 2 * SIDE**3 / statistics.median(seconds[1:])


def _table(seconds: dict[str, float]) -> Table:
    total = sum(seconds.values())
    table = Table(title=f"One optimizer step: {total:.3f} s", title_justify="left")
    table.add_column("part")
    for column in ("seconds", "share"):
        table.add_column(column, justify="right")
    for name in PARTS:
        if name in seconds:
            table.add_row(name, f"{seconds[name]:.3f}", f"{seconds[name] / total:.1%}")
    return table
