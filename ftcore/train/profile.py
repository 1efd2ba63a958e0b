"""`profile=true`: where the time of a step goes, as a table of one page and a Chrome trace.

It measures the steps on what one call of `prepare` returned, after the first, slower ones. They are timed from the end of the
step before, to include data, rollouts and rewards. Only the FLOPs of matmuls are counted, and compared with what this device
reaches in a large matmul of the same precision.
"""

import math
import statistics
from typing import Any

import torch
from lightning import Callback, Trainer
from rich.table import Column, Table

from ftcore.console import Console, plain
from ftcore.run_folder import Run
from ftcore.timing import Watch, settled_time, watches

# Parts of a step in the order of the table. `head`: from hidden states to log-probabilities, whatever needs them.
PARTS = ("data", "rollout", "reward", "forward", "head", "backward", "optimizer")
# Side of the square matrices of the large matmul.
SIDE = 2048


class Profile(Callback):
    """Measures a few steps, and writes profile.txt and profile.json, a Chrome trace."""

    def __init__(self, run: Run, steps: int, updates: int) -> None:
        first = math.ceil(2 / updates) * updates  # the first steps are slower
        self.run, self.first, self.steps = run, max(min(first, steps - updates), 0), min(updates, steps)
        self.tracer = torch.profiler.profile(with_flops=True, record_shapes=True)

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Start here if the run is short."""
        self._start_or_stop(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        """Data are ready: the forward pass begins."""
        self._switch("forward")

    def on_before_backward(self, *_: Any) -> None:
        """The loss is computed: the backward pass begins."""
        self._switch("backward")

    def on_after_backward(self, *_: Any) -> None:
        """The gradient is computed: the optimizer begins, unless micro-batches are left."""
        self._switch("optimizer")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """The step is done, or waits for its next micro-batch."""
        self._switch("data")
        self._start_or_stop(trainer)

    def _switch(self, name: str) -> None:
        if watches:
            watches[-1].switch(name)

    def _start_or_stop(self, trainer: Trainer) -> None:
        if trainer.global_step == self.first and not watches:
            self.tracer.start()
            watches.append(Watch())
        elif trainer.global_step == self.first + self.steps and watches:
            seconds = watches.pop().seconds
            self.tracer.stop()
            if trainer.is_global_zero:
                self._write({name: value / self.steps for name, value in seconds.items()}, trainer.precision)

    def _write(self, seconds: dict[str, float], precision: str) -> None:
        """Write trace and table; `seconds` are those of one step, by part."""
        self.tracer.export_chrome_trace(str(self.run.profile_trace))
        flops = sum(map(_flops, self.tracer.key_averages(group_by_input_shape=True))) / self.steps
        table, rate, most = _table(seconds), flops / sum(seconds.values()) / 1e9, peak(precision) / 1e9
        used = f"{flops / 1e9:,.0f} GFLOP in matmuls, {rate:,.0f} GFLOP/s: {rate / most:.0%} of the {most:,.0f} of a large one."
        with self.run.profile_table.open("w", encoding="utf-8") as file:
            Console(file=file, width=120).print(table, used)
        plain.print(table, used)


def _flops(event: Any) -> float:
    """FLOPs of all calls of one operation and shape. torch's profiler counts those of its own matmuls, not oneDNN's."""
    if event.key != "mkldnn::_linear_pointwise":
        return float(event.flops)
    rows, weight = event.input_shapes[:2]
    return 2.0 * event.count * math.prod(rows) * weight[0]


def peak(precision: str) -> float:
    """FLOP/s of a large matmul on this device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16 if "bf16" in precision else torch.float32)
    seconds = []
    for _ in range(6):
        start = settled_time()
        matrix @ matrix
        seconds.append(settled_time() - start)
    return 2 * SIDE**3 / statistics.median(seconds[1:])


def _table(seconds: dict[str, float]) -> Table:
    total = sum(seconds.values())
    numbers = (Column(name, justify="right") for name in ("seconds", "share"))
    table = Table("part", *numbers, title=f"One optimizer step: {total:.3f} s", title_justify="left")
    for name in filter(seconds.__contains__, PARTS):
        table.add_row(name, f"{seconds[name]:.3f}", f"{seconds[name] / total:.1%}")
    return table
