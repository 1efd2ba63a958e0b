"""What a network predicts, in float32 and only at the positions asked for: logits, log-probabilities, scores."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ftcore.data.layouts import Batch, is_packed, is_shared
from ftcore.kernels.projection import plain_weight, target_logps
from ftcore.timing import part

# N positions of a batch: true entries of a mask (B, T), or their rows and columns (N,) each, which may repeat.
Positions = Tensor | tuple[Tensor, Tensor]


class TokenOutputs(NamedTuple):
    """Of N tokens with loss: log-probabilities (N,), entropies (N,) in nats without gradient, last hidden states (N, H)."""

    logps: Tensor
    entropies: Tensor
    hidden: Tensor


def sequence_scores(network: PreTrainedModel, batch: Batch) -> Tensor:
    """Score (S,) of each sequence, in float32: the model's own, at its last token."""
    if not is_shared(batch):
        return network(**inputs(batch, network.dtype), use_cache=False).logits[:, 0].float()  # (B, 1) -> (B,)
    found: list[Tensor] = []  # the hook puts the scores (B, T, 1) of all tokens here
    with network.get_submodule("score").register_forward_hook(lambda _, args, scores: found.append(scores)):
        output = network(**inputs(batch, network.dtype), use_cache=False)
    rows, columns = batch["ends"]  # (S,) each
    # FSDP2 gathers the weights for the backward pass when a gradient reaches the network's own output.
    return found[0][rows, columns, 0].float() + 0.0 * output.logits.sum()


def logits_at(network: PreTrainedModel, batch: Batch, positions: Positions) -> Tensor:
    """Logits (N, V) in float32 at N `positions`."""
    return _output_at(network, batch, positions, project=True)[0]


def hidden_at(network: PreTrainedModel, batch: Batch, positions: Positions) -> Tensor:
    """Last hidden states (N, H) at N `positions`, without computing logits."""
    return _output_at(network, batch, positions, project=False)[1]


def _output_at(network: PreTrainedModel, batch: Batch, positions: Positions, project: bool) -> tuple[Tensor, Tensor]:
    """Logits (N, V), of no position unless `project`, and last hidden states (N, H).

    A pre-hook on the output projection selects the hidden states. The model's own forward does the rest: soft caps, logit
    scale, hooks of sharding.
    """
    found: list[Tensor] = []

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(args[0][positions])  # (B, T, H) -> (N, H)
        return ((found[0] if project else found[0][:0]).unsqueeze(0), *args[1:])  # a batch of one row

    with network.get_output_embeddings().register_forward_pre_hook(select):
        output = network(**inputs(batch, network.dtype), use_cache=False)
    return output.logits[0].float(), found[0]


def inputs(batch: Batch, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Arguments of a network. Its attention mask separates padded sequences, and answers that share a prompt by a mask
    (B, 1, T, T) that is added to attention scores; sequences packed in one row are separated by their position ids."""
    if not is_packed(batch):
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    mask = _sharing_mask(batch["segments"], dtype) if is_shared(batch) else None
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}


def _sharing_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token (row) sees another (column): itself and earlier ones of the prompt or its own answer. Else very low."""
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # (B, T, T)
    hidden = ~seen.tril()  # no token sees a later one
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[:, None]  # for all heads


def predicted(batch: Batch) -> tuple[Positions, Tensor]:
    """(positions that predict a token with loss, those tokens (N,)).

    A token is predicted at its own position if the batch has `targets` (masked words), else at that of the token before it.
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
    return token_outputs(network, batch, temperature).logps


def token_outputs(
    network: PreTrainedModel, batch: Batch, temperature: float = 1.0, entropies: bool = False
) -> TokenOutputs:
    """Log-probabilities and hidden states of the tokens with loss, row after row; entropies (0,) unless asked for."""
    positions, targets = predicted(batch)
    if (weight := plain_weight(network)) is not None:
        hidden = hidden_at(network, batch, positions)
        with part("head"):
            return TokenOutputs(*target_logps(hidden, weight, targets, temperature, entropies), hidden)
    logits, hidden = _output_at(network, batch, positions, project=True)  # (N, V), (N, H)
    logps = (logits / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = torch.special.entr(logps.exp()).sum(-1) if entropies else logps.new_zeros(0)
    return TokenOutputs(logps.gather(-1, targets[:, None])[:, 0], entropy, hidden)


def row_sums(values: Tensor, batch: Batch) -> Tensor:
    """Sum (S,) over each sequence of `values` (N,), which are in the order of `completion_logps`."""
    sequences = batch["order"] if is_shared(batch) else batch["ids"] if is_packed(batch) else batch["input_ids"]
    return values.new_zeros(len(sequences)).index_add(0, row_numbers(batch), values)


def row_numbers(batch: Batch) -> Tensor:
    """The number of the sequence (N,) that each value of `completion_logps` belongs to, also of those packed in one row."""
    if is_shared(batch):
        return batch["sequences"][batch["completion_mask"]]
    positions = predicted(batch)[0]
    if is_packed(batch):
        return ((batch["position_ids"] == 0).cumsum(-1) - 1)[positions]  # a sequence begins at position 0
    return positions.nonzero()[:, 0]  # type: ignore[union-attr]


def sequence_sums(network: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probability (S,) of each sequence's tokens with loss, summed."""
    return row_sums(completion_logps(network, batch), batch)
