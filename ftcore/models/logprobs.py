"""What a network says of tokens, in float32 and only at the positions that are asked for: logits, or their log-probabilities."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ftcore.data.layouts import Batch
from ftcore.kernels.projection import plain_weight, target_scores
from ftcore.timing import part


def sequence_scores(network: Any, batch: Batch) -> Tensor:
    """Score (B,) of each sequence, in float32: the model's own, at its last token."""
    if "segments" not in batch:
        return (
            network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            .logits[:, 0]
            .float()
        )
    kept: list[Tensor] = []
    hook = network.score.register_forward_hook(lambda _, args, scores: kept.append(scores))
    try:
        output = network(**inputs(batch, network.dtype), use_cache=False)
    finally:
        hook.remove()
    rows, places = batch["ends"]
    # FSDP2 gathers the weights for the backward pass when the gradient of the network's own output comes by.
    return kept[0][rows, places, 0].float() + 0.0 * output.logits.sum()


# N places of a batch: true entries (B, T), or their rows and columns (N,) each, which may come twice.
Places = Tensor | tuple[Tensor, Tensor]


class TokenScores(NamedTuple):
    """Of N tokens with loss: log-probabilities (N,), entropies (N,) in nats without gradient, last hidden states (N, H)."""

    logps: Tensor
    entropies: Tensor
    hidden: Tensor


def logits_at(network: Any, batch: dict[str, Any], positions: Places) -> Tensor:
    """Logits (N, V) in float32 at N `positions`."""
    return _output_at(network, batch, positions)[0]


def hidden_at(network: Any, batch: dict[str, Any], positions: Places) -> Tensor:
    """Last hidden states (N, H) at N `positions`; nothing is projected."""
    return _output_at(network, batch, positions, projected=False)[1]


def _output_at(network: Any, batch: dict[str, Any], positions: Places, projected: bool = True) -> tuple[Tensor, Tensor]:
    """Logits and last hidden states at `positions`; no logits unless `projected`."""
    kept: list[Tensor] = []
    with _before_head(network, kept, lambda hidden: hidden[positions], projected):
        output = network(**inputs(batch, network.dtype), use_cache=False)
    return output.logits[0].float(), kept[0]


@contextmanager
def _before_head(
    network: Any, kept: list[Tensor], select: Callable[[Tensor], Tensor], projected: bool
) -> Iterator[None]:
    """A pre-hook on the output embedding keeps the selected hidden states (N, H) in `kept`, and the model's own forward does
    the rest (soft-capping, logit scale, hooks of sharding), with none of them unless `projected`."""

    def keep(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.append(select(args[0]))
        return ((kept[0] if projected else kept[0][:0]).unsqueeze(0), *args[1:])

    hook = network.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def inputs(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """What a network is given: sequences packed in one row are told apart by positions that begin again, answers that share a
    prompt by a mask (B, 1, T, T) that is added to attention scores, padded ones by theirs."""
    if "segments" in batch:
        mask = _sharing_mask(batch["segments"], dtype)
        return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}
    if "position_ids" in batch:
        return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": None}
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _sharing_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token (row) sees another (column): itself and those before it, of the prompt or its own answer. Else very low."""
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    hidden = ~seen.tril()
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[:, None]


def predicted(batch: dict[str, Any]) -> tuple[Places, Tensor]:
    """(places that predict a token with loss, those tokens (N,)).

    A token is predicted where it stands when the batch has `targets` (masked words), else where the token before it stands.
    """
    mask = batch["completion_mask"]
    if "targets" in batch:
        return mask, batch["targets"][mask]
    if "segments" in batch:
        return (mask.nonzero()[:, 0], batch["previous"][mask]), batch["input_ids"][mask]
    following = mask[:, 1:]  # a first token has nothing before it
    return pad(following, (0, 1)), batch["input_ids"][:, 1:][following]


def completion_logps(network: Any, batch: dict[str, Any], temperature: float = 1.0) -> Tensor:
    """Log-probability (N,) of every token of `batch` with loss, row after row."""
    return token_scores(network, batch, temperature).logps


def token_scores(network: Any, batch: dict[str, Any], temperature: float = 1.0, entropies: bool = False) -> TokenScores:
    """Log-probabilities of the tokens with loss, row after row; `entropies` where they are asked for, else none."""
    positions, targets = predicted(batch)
    if (weight := plain_weight(network)) is not None:
        hidden = hidden_at(network, batch, positions)
        with part("head"):
            return TokenScores(*target_scores(hidden, weight, targets, temperature, entropies), hidden)
    logits, hidden = _output_at(network, batch, positions)
    logps = (logits / temperature).log_softmax(-1)
    with torch.no_grad():
        information = torch.special.entr(logps.exp()).sum(-1) if entropies else logps.new_zeros(0)
    return TokenScores(logps.gather(-1, targets[:, None])[:, 0], information, hidden)


def row_sums(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """Sum (B,) over each sequence of `values` (N,), which stand in the order of `completion_logps`."""
    several = "position_ids" in batch  # in one row
    size = len(batch["order"] if "segments" in batch else batch["ids"] if several else batch["input_ids"])
    return values.new_zeros(size).index_add(0, row_numbers(batch), values)


def row_numbers(batch: dict[str, Any]) -> Tensor:
    """The sequence (N,) that each value of `completion_logps` belongs to; those in one row are told apart."""
    if "segments" in batch:
        return batch["sequences"][batch["completion_mask"]]
    positions = predicted(batch)[0]
    if "position_ids" in batch:
        return ((batch["position_ids"] == 0).cumsum(-1) - 1)[positions]
    return positions.nonzero()[:, 0]  # type: ignore[union-attr]


def sequence_sums(network: Any, batch: dict[str, Any]) -> Tensor:
    """Log-probability (B,) of each row's tokens with loss, summed."""
    return row_sums(completion_logps(network, batch), batch)
