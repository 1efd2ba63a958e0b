"""Log-probabilities of answers under the base model: computed once per content, cached in memory and in FTCORE_HOME.

The base model does not change and its dropout is off, so a value holds for every epoch, every job of a sweep and a resumed run.
The file has 12 bytes per answer, a hash of its tokens and the value, and is only appended to: several processes may share it, and
a killed one leaves no partial record.
"""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ftcore import __version__
from ftcore.data.examples import Example
from ftcore.files import short_hash
from ftcore.settings import Config, Resolved

RECORD = np.dtype([("content", "<i8"), ("value", "<f4")])


class ReferenceSums:
    """Summed log-probabilities by the hash of the content.

    Args:
        file: keeps them between runs (default: only in memory).
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.known = file, dict[int, float]()
        if file and file.is_file():
            content = file.read_bytes()
            if len(content) % RECORD.itemsize:  # the disk was full once
                file.unlink(missing_ok=True)
            else:
                self.known = dict(np.frombuffer(content, RECORD).tolist())

    def __call__(self, contents: list[int], compute: Callable[[], Tensor]) -> Tensor:
        """Values (S,) of a batch's sequences. `compute` gives all of them; it is called if one is not known."""
        new = [content for content in contents if content not in self.known]
        if new or not contents:
            values = compute()
            pairs = zip(contents, values.tolist(), strict=bool(contents))
            self._add({content: value for content, value in pairs if content not in self.known})
            if len(new) == len(contents):
                return values
        return torch.tensor([self.known[content] for content in contents])

    def _add(self, values: dict[int, float]) -> None:
        self.known |= values
        try:
            if self.file and values:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(self.file, "ab", buffering=0, opener=partial(os.open, mode=0o600)) as file:
                    file.write(np.array(list(values.items()), RECORD).tobytes())  # in one system call
        except OSError:  # nowhere to write: from here on only in memory
            self.file = None


def content_hash(example: Example) -> int:
    """Hash of what an example's value depends on: its tokens and which of them have loss."""
    content = np.array(example.input_ids, np.int64).tobytes() + bytes(example.completion_mask)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def base_key(config: Config, resolved: Resolved) -> str:
    """Hash of the base model and of how this machine computes it, to name caches by."""
    model, machine = config["model"], resolved.machine
    weights = resolved.base, config["seed"] if model["random_weights"] else None
    loaded_as = model["attention"], config["adapter"].get("load_in_4bit")
    computed_by = torch.__version__, machine.accelerator, machine.precision, torch.get_num_threads()
    return short_hash([__version__, weights, loaded_as, computed_by])
