"""adapter=freeze: the frozen blocks compute a row once; their output is cached in FTCORE_HOME for all epochs and jobs.

As long as nothing below is random, the hidden states that enter the lowest trained block depend on the row's tokens alone.
A cached row skips the frozen blocks. Each row is a file of its own, moved into place when complete: several processes may share
them, and a killed one leaves no partial file.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftcore.files import whole_file
from ftcore.kernels.attention import needs_no_mask, without_mask

# Output of a transformer block: hidden states (B, T, H), in some architectures the first item of a tuple.
BlockOutput = Tensor | tuple[Tensor, ...]
Forward = Callable[..., BlockOutput]
# Networks that skip blocks for cached rows.
CACHING: WeakSet[nn.Module] = WeakSet()


class ActivationCache:
    """Hidden states (T, H) of rows, without padding, by the row's name, in a folder of at most `limit` bytes."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder = folder
        self.room = limit - sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))

    def get(self, row: str) -> Tensor | None:
        """The hidden states of a row; None when they are not cached."""
        try:
            return load_file(self._file(row))["hidden"]
        except (OSError, SafetensorError, KeyError):  # not there, or cut short by a full disk
            return None

    def put(self, row: str, hidden: Tensor) -> None:
        """Cache a row's hidden states while there is room."""
        if hidden.nbytes > self.room:
            return
        try:
            with whole_file(self._file(row)) as partial:
                save_file({"hidden": hidden.detach().cpu().clone()}, partial)
            self.room -= hidden.nbytes
        except (OSError, SafetensorError):  # nowhere to write: nothing more is cached
            self.room = 0

    def _file(self, row: str) -> Path:
        return self.folder / row[:2] / f"{row}.safetensors"


class FrozenBlocks:
    """The lower blocks of a network, which cached rows skip.

    Args:
        network: a transformers model.
        blocks: its frozen blocks, from the lowest on; nothing before them trains.
        cache: holds their outputs.
    """

    def __init__(self, network: PreTrainedModel, blocks: list[nn.Module], cache: ActivationCache) -> None:
        self.cache = cache
        # Whether this architecture's blocks return tuples; None until one has run.
        self.in_tuple: bool | None = None
        # Name, length and cached states of each row of the batch; empty outside of it and for batches that are not cached.
        self.rows: list[tuple[str, int, Tensor | None]] = []
        network.register_forward_pre_hook(self._begin, with_kwargs=True)
        network.register_forward_hook(lambda *_: self.rows.clear(), always_call=True)
        for block in blocks:
            block.forward = functools.partial(self._forward, block.forward, block is blocks[-1])  # type: ignore[method-assign]

    def _begin(self, network: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Look up the rows of a padded batch by their mask. Generation and rows of several sequences are not cached."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        plain = inputs.get("use_cache") is False and inputs.get("position_ids") is None
        if not plain or ids is None or mask is None or mask.ndim != 2:
            return None
        for row, n in zip(ids.cpu(), mask.sum(1).tolist(), strict=True):
            name = hashlib.blake2b(row[:n].numpy().tobytes(), digest_size=12).hexdigest()
            self.rows.append((name, n, self.cache.get(name)))
        return (args, inputs | without_mask(ids, None)) if needs_no_mask(network) else None

    def _forward(self, forward: Forward, last: bool, hidden: Tensor, *args: object, **kwargs: object) -> BlockOutput:
        """A block's own forward pass, or none when every row is cached. After the last block cached states are put in."""
        if not self.rows:
            return forward(hidden, *args, **kwargs)
        if self.in_tuple is None or any(states is None for *_, states in self.rows):
            output = forward(hidden, *args, **kwargs)
            if not last:
                return output
            self.in_tuple = isinstance(output, tuple)
            hidden = output[0] if isinstance(output, tuple) else output
        if last:
            hidden = self._with_cached(hidden)
        return (hidden,) if self.in_tuple else hidden

    def _with_cached(self, hidden: Tensor) -> Tensor:
        """`hidden` (B, T, H) with the cached states of cached rows; the other rows are now cached."""
        hidden = hidden.clone()
        for k, (name, n, states) in enumerate(self.rows):
            if states is None:
                self.cache.put(name, hidden[k, :n])
            else:
                hidden[k, :n] = states.to(hidden.device)
        return hidden


def cache_activations(network: PreTrainedModel, blocks: list[nn.Module], cache: ActivationCache) -> bool:
    """Cache the outputs of a network's frozen `blocks`; False where they are not the same every time."""
    dropout = any(getattr(module, "attention_dropout", 0) for module in network.modules())
    dropout |= any(module.p for module in network.modules() if isinstance(module, nn.Dropout))
    if not blocks or dropout or network.get_input_embeddings().weight.requires_grad:
        return False
    FrozenBlocks(network, blocks, cache)
    CACHING.add(network)
    return True
