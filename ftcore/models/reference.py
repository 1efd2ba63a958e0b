"""Log-probabilities of answers under the base model: computed once for each content, kept in memory and in FTCORE_HOME.

The base model does not change and its own dropout is off, so an answer's value is good for every epoch, every job of a sweep
and a run that goes on. The file holds 12 bytes for each answer, a hash of its tokens and the value, and is only appended to:
several processes may share it, and one that is killed leaves whole records.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ftcore import __version__
from ftcore.data.tokens import Example
from ftcore.files import home
from ftcore.settings import Config, Resolved

RECORD = np.dtype([("content", "<i8"), ("value", "<f4")])


class ReferenceSums:
    """Sums of log-probabilities by content.

    Args:
        file: where they are kept between runs (default: only in memory).
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.known = file, dict[int, float]()
        if file and file.is_file():
            self._read(file)

    def _read(self, file: Path) -> None:
        content = file.read_bytes()
        if len(content) % RECORD.itemsize:  # the disk was full once
            file.unlink(missing_ok=True)
            return
        records = np.frombuffer(content, RECORD)
        self.known = dict(zip(records["content"].tolist(), records["value"].tolist(), strict=True))

    def __call__(self, contents: list[int], compute: Callable[[], Tensor]) -> Tensor:
        """Values (S,) of a batch's sequences; `compute` gives all of them and is called when one is not known."""
        new = [content for content in contents if content not in self.known]
        if not contents or new:
            values = compute()
            fresh = dict(zip(contents, values.tolist(), strict=True)) if contents else {}
            self._keep({content: fresh[content] for content in new})
            if len(new) == len(contents):
                return values
        return torch.tensor([self.known[content] for content in contents])

    def _keep(self, values: dict[int, float]) -> None:
        self.known |= values
        if not self.file or not values:
            return
        records = np.array(list(values.items()), RECORD).tobytes()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            place = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(place, records)
            finally:
                os.close(place)
        except OSError:  # without a place to keep them they are computed again
            self.file = None


def content_of(example: Example) -> int:
    """What an example's value depends on: its tokens and which of them have loss."""
    said = np.array(example.input_ids, np.int64).tobytes() + bytes(example.completion_mask)
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little", signed=True)


def reference_file(config: Config, resolved: Resolved) -> Path:
    """The file of everything with the same base model, computed in the same way."""
    return home() / "references" / base_name(config, resolved)


def base_name(config: Config, resolved: Resolved) -> str:
    """A name for the base model and the way in which this machine computes it."""
    model, machine = config["model"], resolved.machine
    said = {
        "version": [__version__, torch.__version__],
        "weights": resolved.base,
        "loaded": [model["dtype"], model["attention"], config["adapter"].get("load_in_4bit")],
        "random": config["seed"] if model["random_weights"] else None,
        "computed": [machine.accelerator, machine.precision, torch.get_num_threads()],
    }
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
