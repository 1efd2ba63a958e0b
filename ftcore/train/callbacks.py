"""Callbacks: the numbers of every step, a watchdog, the retention guard, and the best weights."""

import faulthandler
import math
import os
import resource
import shutil
import sys
import threading
import time
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar

from ftcore.console import console, stderr
from ftcore.data.examples import Example
from ftcore.errors import ConfigError, HardwareError, paragraph
from ftcore.evaluate.score import probe_perplexity
from ftcore.methods.base import Method
from ftcore.run_folder import Run
from ftcore.settings import Retention
from ftcore.train import tensors


class StepMetrics(Callback):
    """Logs every optimizer step: loss and its terms, learning rate, gradient norm, tokens, tokens per second, memory."""

    def __init__(self) -> None:
        self.tokens, self.training_seconds, self.started = 0, 0.0, 0.0
        self.shown = dict[str, float]()  # beside the progress bar

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the totals."""
        return {"tokens": self.tokens, "training_seconds": self.training_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's totals."""
        self.tokens, self.training_seconds = state["tokens"], state["training_seconds"]

    def on_train_batch_start(self, trainer: Trainer, method: Method, batch: Any, batch_idx: int) -> None:
        """Start the clock of a step at its first micro-batch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, method: Method, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log when the step is complete; sums are over all processes."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        seconds, totals = time.perf_counter() - self.started, dict(method.step_totals)
        tokens = totals.pop("tokens")
        self.tokens += int(tokens)
        self.training_seconds += seconds
        metrics = {f"train/{name}": value for name, value in (totals | method.metrics).items()} | {
            "train/lr": method.lr * method.lr_factor(max(trainer.global_step - 1, 0)),
            "train/tokens_per_second": tokens / seconds,
            "train/tokens": self.tokens,
            "train/peak_memory_gb": peak_memory_gb(),
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self.shown = {"loss": metrics["train/loss"], "tokens/s": metrics["train/tokens_per_second"]}


class ProgressBar(RichProgressBar):
    """Lightning's progress bar with the numbers of the last step; logged by Lightning they would go over the device."""

    def __init__(self, steps: StepMetrics) -> None:
        super().__init__(leave=True)
        self.steps = steps

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """Loss and tokens per second, and what validation gave, without the version number of a logger."""
        logged = super().get_metrics(trainer, pl_module)
        return {key: value for key, value in (self.steps.shown | logged).items() if key != "v_num"}


class Watchdog(Callback):
    """Ends a process that has done nothing for too long, and prints the stack of each of its threads.

    Otherwise the other processes of the run would wait for it, for hours.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last, self.ended = seconds, 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def on_train_start(self, *_: Any) -> None:
        """Begin to watch."""
        self.last = time.monotonic()
        self.thread.start()

    def on_train_batch_start(self, *_: Any) -> None:
        """Start counting again."""
        self.last = time.monotonic()

    def on_train_end(self, *_: Any) -> None:
        """Stop counting: what follows may take any time. The thread holds all of the run, which ends with it."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()

    on_validation_batch_start = on_train_batch_start  # type: ignore[assignment]
    on_exception = on_train_end  # type: ignore[assignment]

    def _watch(self) -> None:
        left = self.seconds
        while not self.ended.wait(left):
            left = self.last + self.seconds - time.monotonic()
            if left <= 0:
                faulthandler.dump_traceback()
                hangs = f"Nothing was done for {self.seconds:g} seconds (hang_timeout). The stacks above show where it stands"
                stderr.print(paragraph(HardwareError(f"{hangs}, or where it waits for another process.")))
                os._exit(HardwareError.exit_code)  # what hangs may never come to an exception


class RetentionGuard(Callback):
    """Measures the perplexity of general text, and acts when it has risen too far above the base model's."""

    def __init__(self, probe: list[Example], settings: Retention, batch_size: int) -> None:
        self.probe, self.settings, self.batch_size, self.base = probe, settings, batch_size, 0.0

    def on_fit_start(self, trainer: Trainer, method: Method) -> None:
        """Measure the base model's perplexity."""
        with method.foundation.untrained_view():
            self.base = self._perplexity(trainer, method)

    def on_train_batch_end(self, trainer: Trainer, method: Method, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure after every `check_every` optimizer steps."""
        if (batch_idx + 1) % (self.settings["check_every"] * trainer.accumulate_grad_batches):
            return
        rise, limit = self._perplexity(trainer, method) / self.base - 1, self.settings["max_rise"] or math.inf
        for logger in trainer.loggers:
            logger.log_metrics({"retention/rise": rise}, step=trainer.global_step)
        if rise <= limit:
            return
        trainer.should_stop = self.settings["action"] == "stop"
        if not trainer.should_stop:
            method.halve_lr()
            for group in trainer.optimizers[0].param_groups:  # the schedule has set the next step's rate already
                group["lr"] /= 2
        if trainer.is_global_zero:
            console.print(
                f"Perplexity of general text rose by {rise:.1%} (retention.max_rise={limit}) at step "
                f"{trainer.global_step}: {'stopping' if trainer.should_stop else 'halving the learning rate'}."
            )

    @torch.no_grad()
    def _perplexity(self, trainer: Trainer, method: Method) -> float:
        method.network.eval()
        with method.unsharded_and_eager(), trainer.precision_plugin.forward_context():
            perplexity = probe_perplexity(method, self.probe, self.batch_size, "probe")
        method.network.train()
        assert perplexity is not None
        return perplexity


class KeepBest(Callback):
    """Keeps the trained weights of the best validation, and restores them when training ends.

    With `patience`, training ends when the metric `key` has not improved for so many validations.
    """

    def __init__(self, run: Run, key: str, patience: int | None) -> None:
        self.run, self.key, self.patience, self.waited = run, key, patience, 0
        self.best: float | None = None
        self.step = 0  # that `best` is of

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the best value, its step and the number of validations since."""
        return {"best": self.best, "step": self.step, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what a checkpoint kept."""
        self.best, self.step, self.waited = state["best"], state["step"], state["waited"]

    def on_validation_end(self, trainer: Trainer, method: Method) -> None:
        """Save when the metric is lower than ever before."""
        value = trainer.callback_metrics.get(self.key)
        if value is None:
            metrics = ", ".join(sorted(key for key in trainer.callback_metrics if key.startswith("val/")))
            raise ConfigError(f"keep_best={self.key}: validation gives no such metric. It gives: {metrics}.")
        self.waited += 1
        if self.best is None or value < self.best:
            self.best, self.step, self.waited = float(value), trainer.global_step, 0
            tensors.write_whole(self.run.best_weights(self.step), _values(method))
            if trainer.is_global_zero:
                for older in self.run.checkpoints.glob("best-*"):
                    if older != self.run.best_weights(self.step):
                        shutil.rmtree(older, ignore_errors=True)
        if self.patience and self.waited >= self.patience:
            trainer.should_stop = True

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, method: Method) -> None:
        """Load the best weights."""
        if self.best is not None:
            tensors.read(self.run.best_weights(self.step), _values(method))


def _values(method: Method) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in named_trained(method.network).items()}


def named_trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that train, by their names."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def peak_memory_gb() -> float:
    """The most memory that this process has held, in 10^9 bytes: of the GPU if there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
