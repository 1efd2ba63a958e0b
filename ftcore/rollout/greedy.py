"""Greedy decoding."""

from typing import Any

import torch
from transformers import GenerationConfig

from ftcore.data.tokens import Encoder


def generate(network: Any, encoder: Encoder, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy continuations of token-id prompts, as text up to the end token. One batch, padded on the left."""
    pad_id, longest = encoder.tokenizer.pad_token_id or 0, max(map(len, prompts))
    device = next(network.parameters()).device
    input_ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=device)  # (B, T)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id, eos_token_id=encoder.end_ids(network)
    )
    # Each process has all weights here and its own rows: none waits for the others.
    whole = {"generation_config": config, "synced_gpus": False}
    output = network.generate(input_ids=input_ids, attention_mask=mask, **whole)  # (B, T + new tokens)
    return encoder.texts_of(output[:, longest:].tolist())
