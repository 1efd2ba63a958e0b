"""Rollouts: completions sampled from the policy, several for each prompt.

The prompt is computed once per group and its cache shared out; finished rows leave the batch. `sample` is a plain function of a
network and token ids, so another engine can take its place.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(slots=True)
class Completion:
    """Sampled tokens, with the end token when it came, and their log-probabilities.

    `logps` are those of the policy at the sampling temperature, which training compares with. `sampled_logps` are those of the
    distribution drawn from: the same, but renormalised over the tokens that top-p kept. They are equal when top_p is 1.
    """

    ids: list[int]
    logps: list[float]
    sampled_logps: list[float]
    finished: bool = False


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
    device = next(network.parameters()).device
    # 1. Draw all random numbers first: (completions, max_new_tokens), group_size completions for each prompt.
    draws = torch.from_numpy(
        np.concatenate([np.random.default_rng(seed).random((group_size, max_new_tokens)) for seed in seeds])
    ).to(device)
    completions = [Completion([], [], []) for _ in range(len(prompts) * group_size)]
    active = torch.arange(len(completions), device=device)  # (B,): the completion of each row of the batch
    # 2. What the prompts say of the first token, and their keys and values.
    logits, cache, mask = _prompt_pass(network, prompts, group_size, pad_id)  # logits (B, V), mask (B, T)
    for step in range(max_new_tokens):
        # 3. One more token (B,) for each row.
        tokens, logps, sampled_logps = _draw(logits, draws[active, step], temperature, top_p)
        _append(completions, active, tokens, logps, sampled_logps, end_ids)
        # 4. Rows whose token ends them leave the batch: B shrinks.
        going = ~torch.isin(tokens, torch.tensor(end_ids, device=device))
        if step == max_new_tokens - 1 or not going.any():
            break
        if not going.all():
            active, tokens, mask = active[going], tokens[going], mask[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
        # 5. What the new tokens say of the next: T grows by one.
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = _next_logits(network, tokens, mask, cache)
    return [completions[k : k + group_size] for k in range(0, len(completions), group_size)]


def _next_logits(network: PreTrainedModel, tokens: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Logits (B, V) after `tokens` (B,), the last ones of `mask` (B, T)."""
    output = network(
        input_ids=tokens[:, None],
        attention_mask=mask,
        position_ids=mask.sum(1, keepdim=True) - 1,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()  # (B, 1, V) -> (B, V)


def _prompt_pass(
    network: PreTrainedModel, prompts: list[list[int]], group_size: int, pad_id: int
) -> tuple[Tensor, DynamicCache, Tensor]:
    """Logits (B, V) after each prompt, the cache and the attention mask (B, T), each repeated for the rows of its group."""
    device, longest = next(network.parameters()).device, max(map(len, prompts))
    # Padded on the left, so that every prompt ends in the last column.
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    output = network(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=DynamicCache(config=network.config.get_text_config()),
        use_cache=True,
        logits_to_keep=1,
    )
    output.past_key_values.batch_repeat_interleave(group_size)
    logits = output.logits[:, -1].float()  # (prompts, V)
    return logits.repeat_interleave(group_size, 0), output.past_key_values, mask.repeat_interleave(group_size, 0)


def _draw(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B,) by inversion of the cumulative distribution at `draws` (B,), their log-probabilities before and after top-p."""
    logps, order = (logits if temperature == 1 else logits / temperature).log_softmax(-1), None  # (B, V)
    if top_p < 1:
        logps, order = logps.sort(descending=True, dim=-1)  # from here on words by rank
    likely = logps.double().exp()
    cumulative = likely.cumsum(-1)  # (B, V)
    kept = torch.full_like(draws, logps.shape[-1]).long()[:, None]  # (B, 1): how many words may be drawn, all of them
    if top_p < 1:
        kept = (cumulative - likely < top_p).sum(-1, keepdim=True)  # or those that begin below top_p
    mass = cumulative.gather(-1, kept - 1)  # (B, 1): their probability together
    place = torch.searchsorted(cumulative, draws[:, None] * mass).clamp(max=kept - 1)  # (B, 1)
    chosen = logps.gather(-1, place)[:, 0]
    tokens = place if order is None else order.gather(-1, place)
    return tokens[:, 0], chosen, chosen - mass[:, 0].log().float()


def _append(
    completions: list[Completion],
    active: Tensor,
    tokens: Tensor,
    logps: Tensor,
    sampled_logps: Tensor,
    end_ids: list[int],
) -> None:
    columns = (active.tolist(), tokens.tolist(), logps.tolist(), sampled_logps.tolist())
    for row, token, logp, sampled in zip(*columns, strict=True):
        completion = completions[row]
        completion.ids.append(token)
        completion.logps.append(logp)
        completion.sampled_logps.append(sampled)
        completion.finished = token in end_ids
