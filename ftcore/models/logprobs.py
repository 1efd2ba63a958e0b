"""What a network says of tokens, in float32 and only at the positions that are asked for: logits, or their log-probabilities."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ftcore.data.layouts import Batch, is_packed, is_shared
from ftcore.kernels.projection import plain_weight, target_logps
from ftcore.timing import part


def sequence_scores(network: PreTrainedModel, batch: Batch) -> Tensor:
    """Score (S,) of each sequence, in float32: the model's own, at its last token."""
    if not is_shared(batch):
        output = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return output.logits[:, 0].float()  # (B, 1) -> (B,)
    kept: list[Tensor] = []  # the hook puts the scores (B, T, 1) of all tokens there
    hook = network.get_submodule("score").register_forward_hook(lambda _, args, scores: kept.append(scores))
    try:
        output = network(**inputs(batch, network.dtype), use_cache=False)
    finally:
        hook.remove()
    rows, places = batch["ends"]  # (S,) each
    # FSDP2 gathers the weights for the backward pass when the gradient of the network's own output comes by.
    return kept[0][rows, places, 0].float() + 0.0 * output.logits.sum()


# N places of a batch: true entries (B, T), or their rows and columns (N,) each, which may come twice.
Places = Tensor | tuple[Tensor, Tensor]


class TokenScores(NamedTuple):
    """Of N tokens with loss: log-probabilities (N,), entropies (N,) in nats without gradient, last hidden states (N, H)."""

    logps: Tensor
    entropies: Tensor
    hidden: Tensor


def logits_at(network: PreTrainedModel, batch: Batch, positions: Places) -> Tensor:
    """Logits (N, V) in float32 at N `positions`."""
    return _output_at(network, batch, positions)[0]


def hidden_at(network: PreTrainedModel, batch: Batch, positions: Places) -> Tensor:
    """Last hidden states (N, H) at N `positions`; nothing is projected."""
    return _output_at(network, batch, positions, projected=False)[1]


def _output_at(
    network: PreTrainedModel, batch: Batch, positions: Places, projected: bool = True
) -> tuple[Tensor, Tensor]:
    """Logits and last hidden states at `positions`; no logits unless `projected`."""
    kept: list[Tensor] = []  # the hook puts (N, H) there
    with _before_head(network, kept, lambda hidden: hidden[positions], projected):
        output = network(**inputs(batch, network.dtype), use_cache=False)
    return output.logits[0].float(), kept[0]  # the head saw them as one row of N tokens


@contextmanager
def _before_head(
    network: PreTrainedModel, kept: list[Tensor], select: Callable[[Tensor], Tensor], projected: bool
) -> Iterator[None]:
    """A pre-hook on the output embedding keeps the selected hidden states (N, H) in `kept`, and the model's own forward does
    the rest (soft-capping, logit scale, hooks of sharding), with none of them unless `projected`."""

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.append(select(args[0]))  # (B, T, H) -> (N, H)
        return ((kept[0] if projected else kept[0][:0]).unsqueeze(0), *args[1:])  # (1, N, H) or (1, 0, H)

    hook = network.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def inputs(batch: Batch, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """What a network is given: sequences packed in one row are told apart by positions that begin again, answers that share a
    prompt by a mask (B, 1, T, T) that is added to attention scores, padded ones by theirs."""
    if is_shared(batch):
        mask = _sharing_mask(batch["segments"], dtype)
        return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}
    if is_packed(batch):
        return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": None}
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _sharing_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token (row) sees another (column): itself and those before it, of the prompt or its own answer. Else very low."""
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # (B, T, T)
    hidden = ~seen.tril()  # none sees what comes after it
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[:, None]  # for all heads


def predicted(batch: Batch) -> tuple[Places, Tensor]:
    """(places that predict a token with loss, those tokens (N,)).

    A token is predicted where it stands when the batch has `targets` (masked words), else where the token before it stands.
    """
    mask = batch["completion_mask"]
    if "targets" in batch:
        return mask, batch["targets"][mask]
    if is_shared(batch):
        return (mask.nonzero()[:, 0], batch["previous"][mask]), batch["input_ids"][mask]
    following = mask[:, 1:]  # (B, T-1): a first token has nothing before it
    return pad(following, (0, 1)), batch["input_ids"][:, 1:][following]


def completion_logps(network: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Log-probability (N,) of every token of `batch` with loss, row after row."""
    return token_scores(network, batch, temperature).logps


def token_scores(
    network: PreTrainedModel, batch: Batch, temperature: float = 1.0, entropies: bool = False
) -> TokenScores:
    """Log-probabilities of the tokens with loss, row after row; `entropies` where they are asked for, else none."""
    positions, targets = predicted(batch)
    if (weight := plain_weight(network)) is not None:
        hidden = hidden_at(network, batch, positions)
        with part("head"):
            return TokenScores(*target_logps(hidden, weight, targets, temperature, entropies), hidden)
    logits, hidden = _output_at(network, batch, positions)  # (N, V), (N, H)
    logps = (logits / temperature).log_softmax(-1)
    with torch.no_grad():
        information = torch.special.entr(logps.exp()).sum(-1) if entropies else logps.new_zeros(0)
    return TokenScores(logps.gather(-1, targets[:, None])[:, 0], information, hidden)


def row_sums(values: Tensor, batch: Batch) -> Tensor:
    """Sum (S,) over each sequence of `values` (N,), which stand in the order of `completion_logps`."""
    return values.new_zeros(_sequences(batch)).index_add(0, row_numbers(batch), values)


def _sequences(batch: Batch) -> int:
    """S, the number of sequences."""
    if is_shared(batch):
        return len(batch["order"])
    return len(batch["ids"] if is_packed(batch) else batch["input_ids"])


def row_numbers(batch: Batch) -> Tensor:
    """The sequence (N,) that each value of `completion_logps` belongs to; those in one row are told apart."""
    if is_shared(batch):
        return batch["sequences"][batch["completion_mask"]]
    positions = predicted(batch)[0]
    if is_packed(batch):
        return ((batch["position_ids"] == 0).cumsum(-1) - 1)[positions]  # a sequence begins where the position is 0
    return positions.nonzero()[:, 0]  # type: ignore[union-attr]


def sequence_sums(network: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probability (S,) of each sequence's tokens with loss, summed."""
    return row_sums(completion_logps(network, batch), batch)
