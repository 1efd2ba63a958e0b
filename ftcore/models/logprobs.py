"""What a network predicts, in float32 and only at the positions asked for: logits, log-probabilities, scores."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftcore.data.layouts import Batch, is_packed, is_shared
from ftcore.kernels.attention import needs_no_mask, without_mask
from ftcore.kernels.frozen_blocks import CACHING
from ftcore.kernels.projection import projects_alone, target_logps
from ftcore.timing import part

# Rows and columns (N,) each of N positions of a batch, which may repeat.
Positions = tuple[Tensor, Tensor]
# Chooses, of hidden states before the output projection, those that are projected.
Select = Callable[[nn.Module, Tensor], Tensor]


class TokenOutputs(NamedTuple):
    """Of N tokens with loss: log-probabilities (N,), entropies (N,) in nats without gradient, last hidden states (N, H)."""

    logps: Tensor
    entropies: Tensor
    hidden: Tensor


def sequence_scores(network: PreTrainedModel, batch: Batch) -> Tensor:
    """Score (S,) of each sequence, in float32: at its last token, or where the model itself takes it."""
    if not is_shared(batch) and not needs_no_mask(network):
        return network(**inputs(network, batch), use_cache=False).logits[:, 0].float()  # (B, 1) -> (B,)
    found: list[Tensor] = []  # the hook puts the scores (B, T, 1) of all tokens here
    with network.get_submodule("score").register_forward_hook(lambda _, args, scores: found.append(scores)):
        output = network(**inputs(network, batch), use_cache=False)
    rows, columns = batch["ends"]  # (S,) each
    # FSDP2 gathers the weights for the backward pass when a gradient reaches the network's own output.
    return found[0][rows, columns, 0].float() + 0.0 * output.logits.sum()


def logits_at(network: PreTrainedModel, batch: Batch, positions: Positions) -> Tensor:
    """Logits (N, V) in float32 at N `positions`."""
    return _logits(network, batch, positions, lambda _, hidden: hidden)


def hidden_at(network: PreTrainedModel, batch: Batch, positions: Positions) -> Tensor:
    """Last hidden states (N, H) at N `positions`, without computing logits."""
    found: list[Tensor] = []

    def keep(_: nn.Module, hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden[:0]

    _logits(network, batch, positions, keep)
    return found[0]


def _logits(network: PreTrainedModel, batch: Batch, positions: Positions, let_through: Select) -> Tensor:
    """Logits (M, V) in float32 of the hidden states (M, H) that `let_through` returns of those (N, H) at N `positions`.

    It is called with the output projection, before that, and the model's own forward does the rest: soft caps, logit scale,
    hooks of sharding, which have gathered the projection's weight.
    """

    def select(projection: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (let_through(projection, args[0][positions]).unsqueeze(0), *args[1:])  # a batch of one row

    with network.get_output_embeddings().register_forward_pre_hook(select):
        return network(**inputs(network, batch), use_cache=False).logits[0].float()


def inputs(network: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Arguments of a network. Answers that share a prompt are separated by a mask (B, 1, T, T) that is added to attention
    scores, sequences packed in one row by their lengths or, in architectures that take none, by their position ids."""
    ids, bare = {"input_ids": batch["input_ids"]}, needs_no_mask(network)
    if is_shared(batch):
        shared = _sharing_mask(batch["segments"], network.dtype)
        return {**ids, "position_ids": batch["position_ids"], "attention_mask": shared}
    if is_packed(batch):
        apart = without_mask(batch["input_ids"], batch["lengths"]) if bare else {}
        return {**ids, "position_ids": batch["position_ids"], **apart}
    if bare and network not in CACHING:  # the cache knows rows by their mask
        return {**ids, **without_mask(batch["input_ids"], None)}
    return {**ids, "attention_mask": batch["attention_mask"]}


def _sharing_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token (row) sees another (column): itself and earlier ones of the prompt or its own answer. Else very low."""
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # (B, T, T)
    hidden = ~seen.tril()  # no token sees a later one
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[:, None]  # for all heads


def predicted(batch: Batch) -> tuple[Positions, Tensor]:
    """(positions that predict a token with loss, those tokens (N,)).

    A token is predicted at its own position if the batch has `targets` (masked words), else at that of the token before it.
    """
    rows, columns = batch["trained"]
    if "targets" in batch:
        return (rows, columns), batch["targets"][rows, columns]
    before = batch["previous"][rows, columns] if is_shared(batch) else columns - 1
    return (rows, before), batch["input_ids"][rows, columns]


def completion_logps(network: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Log-probability (N,) of every token of `batch` with loss, row after row."""
    return token_outputs(network, batch, temperature).logps


def token_outputs(
    network: PreTrainedModel, batch: Batch, temperature: float = 1.0, entropies: bool = False
) -> TokenOutputs:
    """Log-probabilities and hidden states of the tokens with loss, row after row; entropies (0,) unless asked for."""
    positions, targets = predicted(batch)
    if projects_alone(network):
        return _outputs_in_chunks(network, batch, positions, targets, temperature, entropies)
    found: list[Tensor] = []

    def keep(_: nn.Module, hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden

    logps = (_logits(network, batch, positions, keep) / temperature).log_softmax(-1)  # (N, V)
    with torch.no_grad():
        entropy = torch.special.entr(logps.exp()).sum(-1) if entropies else logps.new_zeros(0)
    return TokenOutputs(logps.gather(-1, targets[:, None])[:, 0], entropy, found[0])


def _outputs_in_chunks(
    network: PreTrainedModel, batch: Batch, positions: Positions, targets: Tensor, temperature: float, entropies: bool
) -> TokenOutputs:
    """`token_outputs` where the projection alone makes the logits, of which only a few exist at a time."""
    found: list[TokenOutputs] = []

    def compute(projection: nn.Module, hidden: Tensor) -> Tensor:
        with part("head"):
            weight: Tensor = projection.weight  # type: ignore[assignment]
            found.append(TokenOutputs(*target_logps(hidden, weight, targets, temperature, entropies), hidden))
        return hidden[:0]

    nothing = _logits(network, batch, positions, compute)  # (0, V)
    # FSDP2 gathers the projection's weight for the backward pass when a gradient reaches the network's own output.
    return found[0]._replace(logps=found[0].logps + 0.0 * nothing.sum())


def row_sums(values: Tensor, batch: Batch) -> Tensor:
    """Sum (S,) over each sequence of `values` (N,), which are in the order of `completion_logps`."""
    sequences = batch["order"] if is_shared(batch) else batch["ids"] if is_packed(batch) else batch["input_ids"]
    return values.new_zeros(len(sequences)).index_add(0, row_numbers(batch).to(values.device), values)


def row_numbers(batch: Batch) -> Tensor:
    """The number of the sequence (N,) that each value of `completion_logps` belongs to, also of those packed in one row."""
    rows, columns = batch["trained"]
    return batch["sequences"][rows, columns] if is_shared(batch) or is_packed(batch) else rows


def sequence_sums(network: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probability (S,) of each sequence's tokens with loss, summed."""
    return row_sums(completion_logps(network, batch), batch)
