"""The comparison of tuned and base model, at the start and the end of the fit."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch import Callback

from ftcore.console import console
from ftcore.errors import StorageError
from ftcore.evaluate.score import HeldOut, Scores, changes, score
from ftcore.files import whole_file
from ftcore.machine.hardware import memory_of
from ftcore.methods.base import Method
from ftcore.settings import Evaluate


class BeforeAfter(Callback):
    """Scores the base model before the first step and the tuned model after the last, on the same held-out rows.

    The base model's scores wait in `file`, so that a run that goes on need not find them again, and in `shared` for other runs.
    """

    def __init__(self, held_out: HeldOut, settings: Evaluate, file: Path, shared: Path | None = None) -> None:
        self.held_out, self.settings, self.file, self.shared = held_out, settings, file, shared
        self.base: Scores = {}
        self.tuned: Scores = {}
        self.base_answers: list[dict[str, Any]] = []
        self.tuned_answers: list[dict[str, Any]] = []
        self.seconds = 0.0

    def scores(self) -> dict[str, Any]:
        """Both models' scores, what was gained and what was forgotten."""
        return {"base": self.base, "tuned": self.tuned, **changes(self.base, self.tuned)}

    def on_fit_start(self, trainer: Trainer, method: Method) -> None:  # type: ignore[override]
        """The base model: the same weights, adapters off."""
        # One process looks, since another run may write in between.
        known = trainer.strategy.broadcast(self._known() if trainer.is_global_zero else None)
        if known is None:
            with method.foundation.untrained_view():
                known = self._score(trainer, method, "base model")
        self.base, self.base_answers = known
        if trainer.is_global_zero:
            _write_once(self.file, known)
            if self.shared:
                with suppress(OSError):  # without a place for them they are found again
                    _write_once(self.shared, known)

    def _known(self) -> Any:
        """Scores and answers of the base model, where they are written down."""
        file = next((file for file in (self.file, self.shared) if file and file.is_file()), None)
        if file and file == self.shared:
            console.print(f"Base model: scores of an earlier run, {file}", soft_wrap=True, highlight=False)
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file else None
        except ValueError:
            raise StorageError(f"{file} cannot be read. Delete it: the base model is scored again.") from None

    def on_train_end(self, trainer: Trainer, method: Method) -> None:  # type: ignore[override]
        """The tuned model: the weights that become model/."""
        self.tuned, self.tuned_answers = self._score(trainer, method, "tuned model")

    def _score(self, trainer: Trainer, method: Method, label: str) -> tuple[Scores, list[dict[str, Any]]]:
        started = time.perf_counter()
        memory = memory_of("evaluate.batch_size", self.settings["batch_size"])
        with method.unsharded_and_eager(), trainer.precision_plugin.forward_context(), memory:
            result = score(method, self.held_out, self.settings, label)
        method.network.train()
        self.seconds += time.perf_counter() - started
        return result


def _write_once(file: Path, content: Any) -> None:
    """Write JSON unless the file is there."""
    if not file.is_file():
        with whole_file(file) as beside:
            beside.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
