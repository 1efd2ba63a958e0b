"""adapter=freeze: what the frozen blocks make of a row is computed once and kept in FTCORE_HOME, for every epoch and every job.

The hidden states that enter the lowest trained block depend on the row's tokens alone, as long as nothing below is random. A
row whose states are known goes past the frozen blocks. Each row has a file of its own, put in place in one move: several
processes may share them, and one that is killed leaves none in halves.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftcore.files import whole_file

# What a transformer block gives: hidden states (B, T, H), in some architectures with other things beside them.
BlockOutput = Tensor | tuple[Tensor, ...]


class KeptActivations:
    """Hidden states (T, H), without padding, by row, in a folder that holds at most `limit` bytes."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.room = folder, limit
        self.room -= sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))

    def get(self, row: str) -> Tensor | None:
        """What is known of a row."""
        try:
            return load_file(self._file(row))["hidden"]
        except (OSError, SafetensorError, KeyError):  # not there, or a disk that was full once
            return None

    def put(self, row: str, hidden: Tensor) -> None:
        """Keep a row's states while there is room."""
        file, size = self._file(row), hidden.nbytes
        if size > self.room:
            return
        try:
            with whole_file(file) as beside:
                save_file({"hidden": hidden.detach().cpu().clone()}, beside)
            self.room -= size
        except (OSError, SafetensorError):  # without a place to keep them they are computed again
            self.room = 0

    def _file(self, row: str) -> Path:
        return self.folder / row[:2] / f"{row}.safetensors"


class FrozenPart:
    """The lower blocks of a network, which rows that are known go past.

    Args:
        network: a transformers model.
        blocks: its frozen blocks, from the lowest on; nothing before them trains.
        kept: where their outputs are.
    """

    def __init__(self, network: PreTrainedModel, blocks: list[nn.Module], kept: KeptActivations) -> None:
        self.kept = kept
        # Whether blocks of this architecture give more than hidden states, once one was seen.
        self.in_tuple: bool | None = None
        self.rows: list[str] = []  # of the batch that is computed; none where nothing is kept
        self.lengths: list[int] = []
        self.known: list[Tensor | None] = []
        network.register_forward_pre_hook(self._begin, with_kwargs=True)
        network.register_forward_hook(self._end, always_call=True)
        for block in blocks:
            block.forward = functools.partial(self._pass, block.forward, block is blocks[-1])  # type: ignore[method-assign]

    def _begin(self, _: nn.Module, args: tuple[object, ...], given: dict[str, Any]) -> None:
        """Look up the rows of a padded batch. Decoding and rows that hold several sequences are computed as ever."""
        mask, ids = given.get("attention_mask"), given.get("input_ids")
        if ids is None or mask is None or mask.ndim != 2 or given.get("position_ids") is not None:
            return
        if given.get("use_cache") is not False:
            return
        self.lengths = mask.sum(1).tolist()
        self.rows = [_name(row[:n]) for row, n in zip(ids.cpu(), self.lengths, strict=True)]
        self.known = [self.kept.get(row) for row in self.rows]

    def _end(self, *_: object) -> None:
        self.rows = []

    def _pass(
        self, forward: Callable[..., BlockOutput], last: bool, hidden: Tensor, *args: object, **given: object
    ) -> BlockOutput:
        """A block's forward pass, or none where every row is known."""
        if not self.rows:
            return forward(hidden, *args, **given)
        if self.in_tuple is not None and all(states is not None for states in self.known):
            hidden = self._placed(hidden) if last else hidden
            return (hidden,) if self.in_tuple else hidden
        output = forward(hidden, *args, **given)
        if not last:
            return output
        self.in_tuple = isinstance(output, tuple)
        hidden = output[0] if isinstance(output, tuple) else output
        for row, n, states, computed in zip(self.rows, self.lengths, self.known, hidden, strict=True):
            if states is None:
                self.kept.put(row, computed[:n])
        hidden = self._placed(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _placed(self, hidden: Tensor) -> Tensor:
        """`hidden` (B, T, H) with what is known in its place: a row has the states that it had the first time."""
        hidden = hidden.clone()
        for k, (n, states) in enumerate(zip(self.lengths, self.known, strict=True)):
            if states is not None:
                hidden[k, :n] = states.to(hidden.device)
        return hidden


def _name(ids: Tensor) -> str:
    return hashlib.blake2b(ids.numpy().tobytes(), digest_size=12).hexdigest()


def keep_activations(network: PreTrainedModel, blocks: list[nn.Module], kept: KeptActivations) -> bool:
    """Let a network keep what its frozen `blocks` give; False where that is not the same every time."""
    dropout = any(isinstance(m, torch.nn.Dropout) and m.p for m in network.modules())
    dropout |= any(getattr(m, "attention_dropout", 0) for m in network.modules())
    if not blocks or dropout or network.get_input_embeddings().weight.requires_grad:
        return False
    FrozenPart(network, blocks, kept)
    return True
