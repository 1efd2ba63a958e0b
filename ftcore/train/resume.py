"""Going on where a run stopped: saving while it trains, stopping when asked to, and starting again at the same step."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning import Trainer
from lightning.pytorch import Callback

from ftcore import __version__
from ftcore.console import console
from ftcore.data import Records
from ftcore.data.steps import TrainBatches
from ftcore.errors import DataError, Stopped, StorageError
from ftcore.methods.base import Method
from ftcore.run_folder import Run
from ftcore.settings import CheckpointSettings
from ftcore.train import checkpoint

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Checkpoints(Callback):
    """Writes checkpoints between optimizer steps: every so many, and before the run ends because a signal asks for it.

    After all callbacks that hold a state, so that it is that of the same step, and before the comparison, which a signal ends at
    once.
    """

    def __init__(self, run: Run, settings: CheckpointSettings, batches: TrainBatches, records: Records) -> None:
        self.run, self.every, self.keep = run, settings["every"], settings["keep"]
        self.stop_on_error = settings["on_error"] == "stop"
        self.batches, self.records = batches, records
        self.asked: int | None = None
        self.before: dict[int, Any] = {}
        self.training = False
        self.start: Path | None = None

    def resume(self, trainer: Trainer, start: Path) -> None:
        """Begin at a checkpoint's step instead of the first. Raises `DataError` when the rows are not the same any more."""
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

    def on_fit_start(self, trainer: Trainer, method: Method) -> None:  # type: ignore[override]
        """Listen to signals."""
        self.before = {number: signal.signal(number, self._asked_to_stop) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, method: Method) -> None:  # type: ignore[override]
        """Put everything back as the checkpoint has it; what was written after it is forgotten."""
        self.training = True
        for number in SIGNALS:  # Lightning listens by now, and would end with exit code 0
            signal.signal(number, self._asked_to_stop)
        for written in (*trainer.loggers, *trainer.callbacks):  # type: ignore[attr-defined]
            if hasattr(written, "keep_until"):
                written.keep_until(self.batches.first_step)
        if self.start is None:
            return
        state, optimizer = checkpoint.read_state(self.start), trainer.optimizers[0]
        checkpoint.load_tensors(self.start, _trained(method), optimizer)
        method.restore(state)
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            scheduler.last_epoch, scheduler._step_count = state["step"], state["step"] + 1
        for group in optimizer.param_groups:
            group["lr"] = method.lr * method.lr_factor(state["step"])
        if scaler := state["scaler"]:
            trainer.precision_plugin.load_state_dict(scaler)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if saved := state["callbacks"].get(type(callback).__name__):
                callback.load_state_dict(saved)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, method: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two steps, unless a validation comes first."""
        between = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if between and not (trainer.limit_val_batches and (batch_idx + 1) % trainer.val_check_batch == 0):  # type: ignore[operator]
            self._save_when_due(trainer, method)

    def on_validation_end(self, trainer: Trainer, method: Method) -> None:  # type: ignore[override]
        """Save after a validation."""
        self._save_when_due(trainer, method)

    def on_train_end(self, trainer: Trainer, method: Method) -> None:  # type: ignore[override]
        """End here when asked to since the last save, and from here on at once: only the comparison follows."""
        self.training = False
        if asked := self._asked(trainer):
            raise self._stopped(asked)

    def teardown(self, trainer: Trainer, method: Method, stage: str) -> None:  # type: ignore[override]
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_exception(self, trainer: Trainer, method: Method, exception: BaseException) -> None:  # type: ignore[override]
        """The same when training fails."""
        self.teardown(trainer, method, "fit")

    def _save_when_due(self, trainer: Trainer, method: Method) -> None:
        step, asked = trainer.global_step, self._asked(trainer)
        # Rollouts that serve several steps are not kept, and the last step's result follows at once.
        if step % self.batches.updates or step >= self.batches.steps:
            return
        if asked or (self.every and step % self.every == 0):
            self._save(trainer, method, step, must=bool(asked))
        if asked:
            raise self._stopped(asked, f" at step {step:,}")

    def _stopped(self, number: int, when: str = "") -> Stopped:
        return Stopped(128 + number, f"{signal.Signals(number).name}{when}. Go on with resume={self.run}")

    def _asked(self, trainer: Trainer) -> int:
        """The signal that one of the processes got; 0 for none."""
        mine = self.asked or 0
        if trainer.world_size == 1:
            return mine
        asked = torch.tensor(float(mine), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(asked, reduce_op="max"))

    def _save(self, trainer: Trainer, method: Method, step: int, must: bool) -> None:
        states = {type(c).__name__: c.state_dict() for c in trainer.callbacks if c.state_dict()}  # type: ignore[attr-defined]
        state = {
            "step": step,
            "draws": self.batches.draws,
            "world_size": self.batches.world_size,
            "data_sha256": self.records.content_hash,
            "versions": _versions(),
            "threads": torch.get_num_threads(),
            **method.progress(),
            "scaler": trainer.precision_plugin.state_dict(),
            "callbacks": states,
        }
        tensors = checkpoint.training_tensors(_trained(method), trainer.optimizers[0])
        try:
            checkpoint.write(self.run.checkpoints, step, tensors, state, self.keep)
        except StorageError as error:
            if must or self.stop_on_error:
                raise
            if trainer.is_global_zero:
                console.print(f"{error} Training goes on (checkpoints.on_error=continue).", style="yellow")

    def _asked_to_stop(self, number: int, _: FrameType | None) -> None:
        """While training, stop between two steps; a second Ctrl-C, and any signal before or after, ends at once."""
        if number == signal.SIGINT and self.asked == number:
            raise KeyboardInterrupt
        if not self.training:
            raise self._stopped(number, " outside training")
        self.asked = number


def _trained(method: Method) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}


def _versions() -> dict[str, str]:
    return {"ftcore": __version__, "torch": torch.__version__, "lightning": lightning.__version__}


def _differences(state: dict[str, Any], world_size: int) -> list[str]:
    """What is not as it was, and what that means."""
    now = _versions() | {"threads": torch.get_num_threads()}
    then = state["versions"] | {"threads": state["threads"]}
    notes = [
        f"{key} was {then[key]}, is {now[key]}: numbers may differ in the last digits."
        for key in now
        if then[key] != now[key]
    ]
    if state["world_size"] != world_size:
        notes.append(
            f"{state['world_size']} processes before, {world_size} now: the order of rows and the averages stay, the noise of "
            "dropout does not."
        )
    return notes


def _fast_forward(trainer: Trainer, step: int, accumulation: int) -> None:
    """Let Lightning's loop count as if it had done `step` optimizer steps and stood between two."""
    loop = trainer.fit_loop
    state = loop.state_dict()

    def set_all(node: dict[str, Any], value: int) -> None:
        for key, inner in node.items():
            if isinstance(inner, dict):
                set_all(inner, value)
            elif not isinstance(inner, bool):
                node[key] = value

    set_all(state["epoch_loop.batch_progress"], step * accumulation)
    set_all(state["epoch_loop.scheduler_progress"], step)
    set_all(state["epoch_loop.automatic_optimization.optim_progress"], step)
    for part in state["epoch_progress"].values():
        part |= {"ready": 1, "started": 1}
    loop.load_state_dict(state)
