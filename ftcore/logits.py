"""The one place where logits are computed: float32, and only at the positions that are asked for."""

from typing import Any

from torch import Tensor
from torch.nn.functional import pad


def logits_at(network: Any, batch: dict[str, Any], positions: Tensor) -> Tensor:
    """Next-token logits (N, V) in float32 at the N true entries of `positions` (B, T).

    A pre-hook on the output embedding keeps those positions' hidden states, and the model's own forward does the rest
    (soft-capping, logit scale, hooks of sharding): the vocabulary is projected nowhere else.
    """

    def keep(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][positions].unsqueeze(0), *args[1:])

    hook = network.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        output = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        hook.remove()
    return output.logits[0].float()


def completion_logps(network: Any, batch: dict[str, Any]) -> Tensor:
    """Log-probability (N,) of every token of `batch` with loss, given what precedes it, row after row."""
    trained = batch["completion_mask"][:, 1:]  # a first token has nothing before it
    logits = logits_at(network, batch, pad(trained, (0, 1)))
    targets = batch["input_ids"][:, 1:][trained]
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
