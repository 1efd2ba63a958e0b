"""Faults on demand: to try what happens, also on a cluster, when a process dies, raises or hangs, or the disk is full.

`FTCORE_FAULTS="kill process=1 step=3 point=save"` in the environment, several joined by ";". Kinds: kill (SIGKILL), raise, hang,
nan (the loss of that step), out_of_memory (in a forward pass of more than one row) and disk_full. Points: step (before its
first forward pass) and save (while its checkpoint is written). A process that is left out means the first one; `seed=7` strikes
only in runs of that seed, one job of a sweep.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch import Callback

from ftcore.errors import ConfigError
from ftcore.machine.processes import rank_and_world
from ftcore.methods.base import Method
from ftcore.train import checkpoint

VARIABLE = "FTCORE_FAULTS"
KINDS = ("kill", "raise", "hang", "nan", "out_of_memory", "disk_full")
POINTS = ("step", "save")


@dataclass(frozen=True)
class Fault:
    """A fault, and where it strikes. Raises `ValueError` for a kind or point that does not exist."""

    kind: str
    step: int
    process: int = 0
    point: str = "step"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.point not in POINTS:
            raise ValueError

    def strike(self) -> None:
        """Do what the kind says."""
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "raise":
            raise RuntimeError(f"a fault that was asked for: {self}")
        elif self.kind == "disk_full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif self.kind == "hang":
            time.sleep(10**6)


def parse(text: str) -> list[Fault]:
    """Read the environment variable's value. Raises `ConfigError` for what is not a fault.

    >>> parse("kill process=1 step=3 point=save")
    [Fault(kind='kill', step=3, process=1, point='save', seed=None)]
    """
    faults = []
    for one in filter(None, map(str.strip, text.split(";"))):
        kind, *words = one.split()
        try:
            place = dict(word.split("=") for word in words)
            point = place.pop("point", "step")
            faults.append(Fault(kind, point=point, **{key: int(value) for key, value in place.items()}))
        except (ValueError, TypeError):
            raise ConfigError(
                f"{VARIABLE}: {one!r} is not a fault such as 'kill process=1 step=3 point=save'."
            ) from None
    return faults


def requested(seed: int) -> list[Callback]:
    """The callback for the faults that the environment asks for in a run of this seed; [] without any."""
    faults = [fault for fault in parse(os.environ.get(VARIABLE, "")) if fault.seed in (None, seed)]
    return [Faults(faults)] if faults else []


class Faults(Callback):
    """Strikes the faults of this process."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        self.write_own = checkpoint.write_own

    def on_fit_start(self, trainer: Trainer, method: Method) -> None:
        """Wrap what writes checkpoints and what computes the loss: these faults do not strike between two batches."""
        write, loss = self.write_own, method.loss

        def write_with_faults(*args: Any) -> Any:
            files = write(*args)
            self._strike("save", trainer.global_step)
            return files

        def loss_with_faults(batch: Any) -> Any:
            terms, kinds = loss(batch), {fault.kind for fault in self._here("step", trainer.global_step + 1)}
            if "out_of_memory" in kinds and len(batch["ids"]) > 1:
                raise torch.OutOfMemoryError
            if "nan" in kinds:
                terms = {name: term._replace(values=term.values * float("nan")) for name, term in terms.items()}
            return terms

        checkpoint.write_own, method.loss = write_with_faults, loss_with_faults  # type: ignore[assignment, method-assign]

    def on_train_batch_start(self, trainer: Trainer, method: Method, batch: Any, batch_idx: int) -> None:
        """Strike before the step's first micro-batch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._strike("step", trainer.global_step + 1)

    def teardown(self, trainer: Trainer, method: Method, stage: str) -> None:
        """Leave what writes checkpoints as it was: another run of this process has its own faults, or none."""
        checkpoint.write_own = self.write_own

    def on_exception(self, trainer: Trainer, method: Method, exception: BaseException) -> None:
        """The same when training fails."""
        self.teardown(trainer, method, "fit")

    def _strike(self, point: str, step: int) -> None:
        for fault in self._here(point, step):
            fault.strike()

    def _here(self, point: str, step: int) -> list[Fault]:
        rank, _ = rank_and_world()
        return [f for f in self.faults if (f.process, f.point, f.step) == (rank, point, step)]
