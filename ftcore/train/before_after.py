"""The comparison of tuned and base model, at the start and the end of the fit."""

import json
import math
import time
from contextlib import suppress
from pathlib import Path

from lightning import Trainer
from lightning.pytorch import Callback

from ftcore.console import console
from ftcore.errors import NumericalError, StorageError
from ftcore.evaluate.score import Measured, changes, score
from ftcore.evaluate.tables import intervals
from ftcore.files import to_json, write_text
from ftcore.machine.hardware import memory_of
from ftcore.methods.base import HeldOut, Method
from ftcore.run_folder import Scores
from ftcore.settings import Evaluate


class BeforeAfter(Callback):
    """Scores the base model before the first step and the tuned model after the last, on the same held-out rows.

    The base model's scores are kept in `file` for when this run is resumed, and in `cache` for other runs.
    """

    def __init__(self, held_out: HeldOut, settings: Evaluate, file: Path, cache: Path | None = None) -> None:
        self.held_out, self.settings, self.file, self.cache, self.seconds = held_out, settings, file, cache, 0.0
        self.base, self.tuned = Measured({}, [], {}), Measured({}, [], {})

    def scores(self) -> dict[str, object]:
        """Both models' scores, how sure their differences are, what was gained and what was forgotten."""
        base, tuned = self.base, self.tuned
        differences = intervals(base.by_row, tuned.by_row)
        return {
            "base": base.scores,
            "tuned": tuned.scores,
            "intervals": differences,
            **changes(base.scores, tuned.scores),
        }

    def on_fit_start(self, trainer: Trainer, method: Method) -> None:
        """Score the base model: the same weights, adapters off."""
        # Only one process looks for earlier scores: another run may write them in between.
        result = trainer.strategy.broadcast(self._earlier() if trainer.is_global_zero else None)
        if result is None:
            with method.foundation.untrained_view():
                result = self._score(trainer, method, "base model")
        self.base = result
        if not is_finite(self.base.scores):
            raise NumericalError(
                "The base model's scores are not finite before any step: its weights or hardware.precision do not fit. Try "
                "hardware.precision=32-true."
            )
        if trainer.is_global_zero:
            _write_once(self.file, result)
            if self.cache:
                with suppress(OSError):  # without a cache the next run scores again
                    _write_once(self.cache, result)

    def _earlier(self) -> Measured | None:
        """What the base model got earlier; None when that is not known."""
        file = next((file for file in (self.file, self.cache) if file and file.is_file()), None)
        if file and file == self.cache:
            console.print(f"Base model: scores of an earlier run, {file}", soft_wrap=True, highlight=False)
        try:
            return Measured(*json.loads(file.read_text(encoding="utf-8"))) if file else None
        except (ValueError, TypeError):
            raise StorageError(f"{file} cannot be read. Delete it: the base model is scored again.") from None

    def on_train_end(self, trainer: Trainer, method: Method) -> None:
        """Score the tuned model: the weights that become model/."""
        self.tuned = self._score(trainer, method, "tuned model")

    def _score(self, trainer: Trainer, method: Method, label: str) -> Measured:
        started = time.perf_counter()
        memory = memory_of("evaluate.batch_size", self.settings["batch_size"])
        with method.unsharded_and_eager(), trainer.precision_plugin.forward_context(), memory:
            result = score(method, self.held_out, self.settings, label)
        method.network.train()
        self.seconds += time.perf_counter() - started
        return result


def is_finite(scores: Scores) -> bool:
    """Whether all scores that there are are finite numbers."""
    return all(math.isfinite(value) for value in scores.values() if value is not None)


def _write_once(file: Path, content: Measured) -> None:
    """Write JSON unless the file exists."""
    if not file.is_file():
        write_text(file, to_json(content))
