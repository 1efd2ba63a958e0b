"""Causal attention of training rows without a mask, so that SDPA can take its fastest kernels and nothing is (T, T).

Padding on the right needs none: no token sees a later one, and padding has no loss. Sequences packed in one row are cut apart,
and a window over the last tokens is computed in blocks of its own width. transformers would build a mask of what sees what, and
make the host wait to learn whether it needs one. It is registered as transformers' own "sdpa", and is that for all other calls.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Architectures that tests have shown to need nothing but this: they hand `sequence_lengths` on to every layer.
CAUSAL = {"gemma", "gemma3_text", "gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"}


def needs_no_mask(network: PreTrainedModel) -> bool:
    """Whether the lengths of sequences are all that the network's attention needs, with `without_mask`."""
    config = network.config.get_text_config()
    causal = config.model_type in CAUSAL and not getattr(config, "use_bidirectional_attention", None)
    return causal and config._attn_implementation == "sdpa"


def without_mask(input_ids: Tensor, lengths: list[int] | None) -> dict[str, Any]:
    """Arguments of a network for rows (B, T) that hold a sequence and padding, or, with `lengths`, those one after the other."""
    # transformers hands a mask of four dimensions on as it is; `attention` does not read this one.
    return {
        "attention_mask": input_ids.new_ones(1, 1, 1, 1),
        "sequence_lengths": lengths or [input_ids.shape[1]],
    }


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Output (B, T, heads, D) for queries, keys and values (B, heads, T, D): transformers' own, or that without a mask."""
    if sequence_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    sequences = zip(*(tensor.split(sequence_lengths, 2) for tensor in (query, key, value)), strict=True)
    blocks = (block for q, k, v in sequences for block in _blocks(q, k, v, sliding_window))
    outputs = [sdpa_attention_forward(module, q, k, v, mask, **options)[0] for q, k, v, mask in blocks]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), None


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, window: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Queries of one sequence with the keys and values that they see and their mask; None where all earlier tokens are seen."""
    n = q.shape[2]
    if not window or n <= window:
        yield q, k, v, None
        return
    for start in range(0, n, window):
        end, first = min(start + window, n), max(start - window + 1, 0)
        places, seen = torch.arange(start, end, device=q.device), torch.arange(first, end, device=q.device)
        distance = places[:, None] - seen  # (queries, keys)
        mask = (distance >= 0) & (distance < window)
        yield q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], mask[None, None]


AttentionInterface.register("sdpa", attention)
