"""What happens beside training: numbers of every step, the comparison with the base model, and the best weights."""

import faulthandler
import resource
import sys
import time
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar
from safetensors.torch import load_file, save_file

from ftcore.console import console
from ftcore.data.tokens import Example
from ftcore.errors import ConfigError
from ftcore.evaluate.score import probe_perplexity
from ftcore.files import whole_file
from ftcore.methods.base import Method
from ftcore.models.sharding import full_tensor, sharded_like
from ftcore.run_folder import Run


class ProgressBar(RichProgressBar):
    """Lightning's bar over the optimizer's micro-batches, without a version number that means nothing here."""

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """Loss and tokens per second."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class StepMetrics(Callback):
    """Logs every optimizer step: loss and its terms, learning rate, gradient norm, tokens, tokens per second, memory."""

    def __init__(self) -> None:
        self.tokens = 0
        self.tokens_of_step = 0
        self.training_seconds = 0.0
        self.started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"tokens": self.tokens, "training_seconds": self.training_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.tokens, self.training_seconds = state["tokens"], state["training_seconds"]

    def on_train_batch_start(self, trainer: Trainer, method: Method, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """Start the clock of a step at its first micro-batch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.started, self.tokens_of_step = time.perf_counter(), 0

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, method: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log when the step is complete; sums are over all processes."""
        self.tokens_of_step += int(batch["attention_mask"].sum()) if batch["ids"] else 0
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        seconds = time.perf_counter() - self.started
        found = method.take_step_metrics()
        names = sorted(found)
        values = [found[name].double() for name in names]
        mine = torch.stack(
            [*values, torch.tensor(float(self.tokens_of_step), dtype=torch.float64, device=method.device)]
        )
        *sums, tokens = trainer.strategy.reduce(mine, reduce_op="sum").tolist()
        self.tokens += int(tokens)
        self.training_seconds += seconds
        metrics = {f"train/{name}": value for name, value in zip(names, sums, strict=True)} | {
            **{f"train/{name}": value for name, value in method.metrics.items()},
            "train/lr": method.lr * method.lr_factor(max(trainer.global_step - 1, 0)),
            "train/grad_norm": float(method.grad_norm),
            "train/tokens_per_second": tokens / seconds,
            "train/tokens": self.tokens,
            "train/peak_memory_gb": peak_memory_gb(),
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        method.log("loss", metrics["train/loss"], prog_bar=True, logger=False)
        method.log("tokens/s", metrics["train/tokens_per_second"], prog_bar=True, logger=False)


class Watchdog(Callback):
    """Ends a process that has done nothing for too long, and says where each of its threads stands.

    A process that hangs would let the others of the run wait for it, and cost hours.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *_: Any) -> None:
        """Count from here again."""
        faulthandler.dump_traceback_later(self.seconds, exit=True)

    def on_validation_batch_start(self, *_: Any) -> None:  # type: ignore[override]
        """The same."""
        self.on_train_batch_start()

    def on_train_end(self, *_: Any) -> None:
        """What comes now takes as long as it takes."""
        faulthandler.cancel_dump_traceback_later()

    def on_exception(self, *_: Any) -> None:
        """The same when training fails."""
        self.on_train_end()


class RetentionGuard(Callback):
    """Looks at the perplexity of general text and acts when it has risen too far above the base model's."""

    def __init__(self, probe: list[Example], max_rise: float, check_every: int, action: str, batch_size: int) -> None:
        self.probe, self.max_rise, self.check_every, self.action = probe, max_rise, check_every, action
        self.batch_size, self.base = batch_size, 0.0

    def on_fit_start(self, trainer: Trainer, method: Method) -> None:  # type: ignore[override]
        """The base model's perplexity."""
        with method.foundation.untrained_view():
            self.base = self._perplexity(trainer, method)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, method: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look after every `check_every` optimizer steps."""
        if (batch_idx + 1) % (self.check_every * trainer.accumulate_grad_batches):
            return
        rise = self._perplexity(trainer, method) / self.base - 1
        for logger in trainer.loggers:
            logger.log_metrics({"retention/rise": rise}, step=trainer.global_step)
        if rise > self.max_rise:
            if self.action == "halve_lr":
                method.halve_lr()
                for group in trainer.optimizers[0].param_groups:  # the schedule has set the next step's rate already
                    group["lr"] /= 2
            trainer.should_stop = self.action == "stop"
            if trainer.is_global_zero:
                console.print(
                    f"Perplexity of general text rose by {rise:.1%} (retention.max_rise={self.max_rise}) at step "
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
    """Keeps the trained weights of the best validation and puts them back when training ends.

    With `patience`, training ends when the metric has not improved for so many validations.
    """

    def __init__(self, run: Run, key: str, patience: int | None) -> None:
        self.file, self.key, self.patience = run.best_weights, key, patience
        self.best: float | None = None
        self.waited = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on comparing."""
        self.best, self.waited = state["best"], state["waited"]

    def on_validation_end(self, trainer: Trainer, method: Method) -> None:  # type: ignore[override]
        """Save when the metric is lower than ever before."""
        value = trainer.callback_metrics.get(self.key)
        if value is None:
            known = ", ".join(sorted(str(key) for key in trainer.callback_metrics if str(key).startswith("val/")))
            raise ConfigError(f"keep_best={self.key}: validation gives no such metric. It gives: {known}.")
        self.waited += 1
        if self.best is None or value < self.best:
            self.best, self.waited = float(value), 0
            weights = {name: full_tensor(value.detach()).contiguous() for name, value in _trained(method).items()}
            if trainer.is_global_zero:
                with whole_file(self.file) as beside:
                    save_file(weights, beside)
        if self.patience and self.waited >= self.patience:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, method: Method) -> None:  # type: ignore[override]
        """Load the best weights."""
        trainer.strategy.barrier()
        if self.best is not None:
            weights, trained = load_file(self.file), _trained(method)
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(sharded_like(weights[name], parameter))


def _trained(method: Method) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in method.network.named_parameters() if parameter.requires_grad}


def peak_memory_gb() -> float:
    """Largest memory this process has held, in 10^9 bytes: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
