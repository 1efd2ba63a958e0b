"""Greedy decoding."""

from typing import Any

from transformers import GenerationConfig

from ftcore.data.tokens import Encoder
from ftcore.rollout.sample import left_padded


def generate(network: Any, encoder: Encoder, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy continuations of token-id prompts, as text up to the end token. All prompts form one batch."""
    pad_id = encoder.tokenizer.pad_token_id or 0
    input_ids, mask = left_padded(prompts, pad_id, network.device)  # (B, T)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id, eos_token_id=encoder.end_ids(network)
    )
    # Not synced: each process has all weights here and its own rows, so none waits for the others.
    output = network.generate(
        input_ids, attention_mask=mask, generation_config=config, synced_gpus=False
    )  # (B, T + new)
    return encoder.decode(output[:, input_ids.shape[1] :].tolist())
