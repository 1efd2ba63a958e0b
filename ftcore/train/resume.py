"""Checkpoints while a run trains, stopping on a signal, and resuming at the same step."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning import Trainer
from lightning.pytorch import Callback

from ftcore import __version__
from ftcore.console import console, typed
from ftcore.data import Records
from ftcore.data.steps import TrainBatches
from ftcore.errors import DataError, Stopped, StorageError
from ftcore.machine.isolated import heeded
from ftcore.methods.base import Method
from ftcore.run_folder import Run
from ftcore.settings import CheckpointSettings
from ftcore.train import checkpoint
from ftcore.train.callbacks import named_trained

# SIGHUP: the terminal is closed.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Checkpoints(Callback):
    """Writes checkpoints between optimizer steps: every so many, and when a signal stops the run.

    It comes after all callbacks with a state, so that their states are those of the same step, and before the comparison, which
    a signal ends at once.
    """

    def __init__(self, run: Run, settings: CheckpointSettings, batches: TrainBatches, records: Records) -> None:
        self.run, self.settings, self.batches, self.records = run, settings, batches, records
        self.received, self.training = 0, False
        self.earlier_handlers: dict[int, Any] = {}
        self.start: Path | None = None

    def resume(self, trainer: Trainer, start: Path) -> None:
        """Start at a checkpoint's step instead of the first. Raises `DataError` when the rows have changed."""
        state = checkpoint.read_state(start)
        if state["data_sha256"] != self.records.content_hash:
            raise DataError(
                f"The rows have changed since {start} was written (their hash was {state['data_sha256'][:12]}, now "
                f"{self.records.content_hash[:12]}). Put them back, or begin a new run without resume."
            )
        self.start = start
        self.batches.start(state["step"], state["draws"])
        _fast_forward(trainer, state["step"], self.batches.accumulation)
        if trainer.is_global_zero:
            console.print(f"Going on after step {state['step']:,} of {self.batches.steps:,}: {start}", soft_wrap=True)
            for note in _differences(state, self.batches.world_size):
                console.print(note)

    def on_fit_start(self, trainer: Trainer, method: Method) -> None:
        """Install our signal handlers, but for what is ignored, as nohup has it."""
        self.earlier_handlers = {number: signal.signal(number, self._on_signal) for number in heeded(SIGNALS)}

    def on_train_start(self, trainer: Trainer, method: Method) -> None:
        """Restore the checkpoint, and delete from all logs what was written after it."""
        self.training = True
        for number in self.earlier_handlers:  # again: Lightning has put its own, which would end with exit code 0
            signal.signal(number, self._on_signal)
        for log in (*trainer.loggers, *trainer.callbacks):  # type: ignore[attr-defined]
            if hasattr(log, "keep_until"):
                log.keep_until(self.batches.first_step)
        if self.start is None:
            return
        state, optimizer = checkpoint.read_state(self.start), trainer.optimizers[0]
        checkpoint.load_tensors(self.start, named_trained(method), optimizer)
        method.restore(state)
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            scheduler.last_epoch, scheduler._step_count = state["step"], state["step"] + 1
        for group in optimizer.param_groups:
            group["lr"] = method.lr * method.lr_factor(state["step"])
        self._note_rate(trainer, state["step"])
        if scaler := state["scaler"]:
            trainer.precision_plugin.load_state_dict(scaler)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if saved := state["callbacks"].get(type(callback).__name__):
                callback.load_state_dict(saved)

    def _note_rate(self, trainer: Trainer, step: int) -> None:
        """Say how the learning rate goes on, where the run has other settings than it began with."""
        before = [line["train/lr"] for line in self.run.metrics() if line["step"] == step and "train/lr" in line]
        if self.run.first_config and before and trainer.is_global_zero:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            console.print(f"Learning rate: {before[-1]:.3g} in step {step:,}, {rate:.3g} in step {step + 1:,}")

    def on_train_batch_end(self, trainer: Trainer, method: Method, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save between two steps, unless a validation follows."""
        between = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if between and not (trainer.limit_val_batches and (batch_idx + 1) % trainer.val_check_batch == 0):  # type: ignore[operator]
            self._save_when_due(trainer, method)

    def on_validation_end(self, trainer: Trainer, method: Method) -> None:
        """Save after a validation."""
        self._save_when_due(trainer, method)

    def on_train_end(self, trainer: Trainer, method: Method) -> None:
        """Stop here if a signal came since the last save. From here on, where only the comparison follows, it stops at once."""
        self.training = False
        if number := self._signal_of_any(trainer):
            raise self._stopped(number)

    def restore_handlers(self) -> None:
        """Restore the signal handlers. Comes after Lightning, which puts back ours, and so would keep all of a failed run."""
        for number, handler in self.earlier_handlers.items():
            signal.signal(number, handler)

    def _save_when_due(self, trainer: Trainer, method: Method) -> None:
        step, number, every = trainer.global_step, self._signal_of_any(trainer), self.settings["every"]
        # Not between steps on the same rollouts, which a checkpoint does not keep, nor after the last step.
        if step % self.batches.updates or step >= self.batches.steps:
            return
        if number or (every and step % every == 0):
            self._save(trainer, method, step, must=number > 0)
        if number:
            raise self._stopped(number, f" at step {step:,}")

    def _stopped(self, number: int, when: str = "") -> Stopped:
        return Stopped(128 + number, f"{signal.Signals(number).name}{when}. Go on with {typed(f'resume={self.run}')}")

    def _signal_of_any(self, trainer: Trainer) -> int:
        """The signal that one of the processes got; 0 for none. A single process need not wait for its device."""
        if trainer.world_size == 1:
            return self.received
        own = torch.tensor(float(self.received), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(own, reduce_op="max"))

    def _save(self, trainer: Trainer, method: Method, step: int, must: bool) -> None:
        states = {type(c).__name__: c.state_dict() for c in trainer.callbacks if c.state_dict()}  # type: ignore[attr-defined]
        state = {
            "step": step,
            "draws": self.batches.draws,
            "world_size": self.batches.world_size,
            "data_sha256": self.records.content_hash,
            "environment": _environment(),
            **method.progress(),
            "scaler": trainer.precision_plugin.state_dict(),
            "callbacks": states,
        }
        tensors = checkpoint.training_tensors(named_trained(method), trainer.optimizers[0])
        try:
            checkpoint.write(self.run.checkpoints, step, tensors, state, self.settings["keep"])
        except StorageError as error:
            if must or self.settings["on_error"] == "stop":
                raise
            if trainer.is_global_zero:
                console.print(f"{error} Training goes on (checkpoints.on_error=continue).", style="yellow")

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """While training, stop between two steps. A second Ctrl-C, or any signal before or after training, stops at once."""
        if number == signal.SIGINT and self.received == number:
            raise KeyboardInterrupt
        if not self.training:
            raise self._stopped(number, " outside training")
        self.received = number


def _environment() -> dict[str, object]:
    """What may change the last digits of numbers."""
    versions = {"ftcore": __version__, "torch": torch.__version__, "lightning": lightning.__version__}
    return {**versions, "threads": torch.get_num_threads()}


def _differences(state: dict[str, Any], world_size: int) -> list[str]:
    """What differs from when the checkpoint was written, and what that means for the numbers."""
    was, notes = state["environment"], []
    for key, now in _environment().items():
        if was[key] != now:
            notes.append(f"{key} was {was[key]}, is {now}: numbers may differ in the last digits.")
    if (before := state["world_size"]) != world_size:
        notes.append(
            f"{before} processes before, {world_size} now: order of rows and averages stay the same, dropout's noise does not."
        )
    return notes


def _fast_forward(trainer: Trainer, step: int, accumulation: int) -> None:
    """Set the counters of Lightning's loop as if it had just done `step` optimizer steps."""
    state = trainer.fit_loop.state_dict()

    def set_all(node: dict[str, Any], value: int) -> None:
        for key, inner in node.items():
            if isinstance(inner, dict):
                set_all(inner, value)
            elif not isinstance(inner, bool):
                node[key] = value

    set_all(state["epoch_loop.batch_progress"], step * accumulation)
    set_all(state["epoch_loop.scheduler_progress"], step)
    set_all(state["epoch_loop.automatic_optimization.optim_progress"], step)
    for counts in state["epoch_progress"].values():
        counts |= {"ready": 1, "started": 1}
    trainer.fit_loop.load_state_dict(state)
