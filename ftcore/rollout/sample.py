"""Completions: sampled from the policy, several for each prompt (`sample`), or greedy ones as text (`generate`).

`sample` computes a prompt once per group and copies its cache for each completion; finished rows leave the batch. It is a plain
function of a network and token ids, so another engine can take its place.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from ftcore.data.tokens import Encoder
from ftcore.rollout.cache import roomy_cache


@dataclass(slots=True)
class Completion:
    """Sampled tokens, including the end token if there was one, and their log-probabilities.

    These are the policy's at the sampling temperature, with which training compares; top-p does not change them.
    """

    ids: list[int]
    logps: np.ndarray
    finished: bool


@torch.no_grad()
def sample(
    network: PreTrainedModel,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    end_ids: list[int],
    pad_id: int,
) -> list[list[Completion]]:
    """`group_size` completions of every prompt, each at most `max_new_tokens` long.

    A prompt's draws come from its seed alone, so they do not depend on which prompts share its batch or process.
    """
    device = network.device
    # 1. Draw all random numbers first: (completions, max_new_tokens), group_size completions for each prompt.
    numbers = [np.random.default_rng(seed).random((group_size, max_new_tokens)) for seed in seeds]
    draws = torch.from_numpy(np.concatenate(numbers)).to(device)
    active = torch.arange(len(draws), device=device)  # (B,): the completion of each row of the batch
    drawn = torch.full(draws.shape, -1, device=device)  # (completions, max_new_tokens): -1 after the end
    chances, ends = torch.zeros(draws.shape, device=device), torch.tensor(end_ids, device=device)
    # 2. Compute each prompt once, then repeat its logits (B, V), keys and values for the rows of its group.
    ids, mask = _left_padded(prompts, pad_id, device)  # (B, T)
    cache = roomy_cache(network.config, max_new_tokens)
    logits = last_logits(network, ids, mask, cache).repeat_interleave(group_size, 0)
    cache.batch_repeat_interleave(group_size)
    mask = mask.repeat_interleave(group_size, 0)
    for step in range(max_new_tokens):
        # 3. One more token (B,) for each row.
        tokens, logps = draw_tokens(logits, draws[active, step], temperature, top_p)
        drawn[active, step], chances[active, step] = tokens, logps
        if step == max_new_tokens - 1:
            break
        # 4. Rows that drew an end token leave the batch: B shrinks. The host waits for the device here alone.
        going = (~torch.isin(tokens, ends)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(tokens):
            active, tokens, mask = active[going], tokens[going], mask[going]
            cache.batch_select_indices(going)
        # 5. Logits after the new tokens: T grows by one.
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = last_logits(network, tokens[:, None], mask, cache)
    completions = _completions(drawn, chances, end_ids)
    return [completions[k : k + group_size] for k in range(0, len(completions), group_size)]


def _completions(drawn: Tensor, logps: Tensor, end_ids: list[int]) -> list[Completion]:
    """Completions from tokens (C, T), -1 after the end of each, and their log-probabilities (C, T)."""
    rows = zip((drawn >= 0).sum(1).tolist(), drawn.tolist(), logps.cpu().numpy(), strict=True)
    return [Completion(ids[:n], row[:n], ids[n - 1] in end_ids) for n, ids, row in rows]


def generate(network: Any, encoder: Encoder, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy continuations of token-id prompts, as text up to the end token. All prompts form one batch."""
    pad_id = encoder.tokenizer.pad_token_id or 0
    input_ids, mask = _left_padded(prompts, pad_id, network.device)  # (B, T)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id, eos_token_id=encoder.end_ids(network)
    )
    # Not synced: each process has all weights here and its own rows, so none waits for the others.
    options = {"generation_config": config, "synced_gpus": False}
    cache = roomy_cache(network.config, max_new_tokens)
    output = network.generate(input_ids, attention_mask=mask, past_key_values=cache, **options)  # (B, T + new)
    return encoder.decode(output[:, input_ids.shape[1] :].tolist())


def _left_padded(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, T) of prompts, padded on the left so that each ends in the last column."""
    longest = max(map(len, prompts))
    ids = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def last_logits(network: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Logits (B, V) after `ids`, which are the last columns of `mask` (B, T); the cache holds those before."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    output = network(input_ids=ids, attention_mask=mask, position_ids=positions, **options)
    return output.logits[:, -1].float()  # (B, 1, V) -> (B, V)


def draw_tokens(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens (B,) by inverse transform sampling at `draws` (B,), and their log-probabilities without top-p."""
    logps, order = (logits if temperature == 1 else logits / temperature).log_softmax(-1), None  # (B, V)
    if top_p < 1:
        logps, order = logps.sort(descending=True, dim=-1)  # from here on by rank
    likely = logps.double().exp()
    cumulative = likely.cumsum(-1)  # (B, V)
    kept = torch.full_like(draws, logps.shape[-1]).long()[:, None]  # (B, 1): how many tokens may be drawn: all,
    if top_p < 1:
        kept = (cumulative - likely < top_p).sum(-1, keepdim=True)  # or those that begin below top_p
    mass = cumulative.gather(-1, kept - 1)  # (B, 1): their total probability
    place = torch.searchsorted(cumulative, draws[:, None] * mass).clamp(max=kept - 1)  # (B, 1)
    tokens = place if order is None else order.gather(-1, place)
    return tokens[:, 0], logps.gather(-1, place)[:, 0]
