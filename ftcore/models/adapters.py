"""Which parameters train: low-rank adapters (peft), all, or the top layers."""

from collections import Counter
from dataclasses import replace
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from torch import nn

from ftcore.console import plain
from ftcore.errors import ConfigError, ModelError
from ftcore.models.blocks import transformer_blocks
from ftcore.models.foundation import Foundation


def lora(
    foundation: Foundation,
    /,
    *,
    rank: Annotated[int, Ge(1)],
    alpha: Annotated[int, Gt(0)],
    dropout: Annotated[float, Ge(0), Lt(1)],
    target_modules: str | list[str],
    allow_unmatched: bool,
    use_dora: bool,
    use_rslora: bool,
    load_in_4bit: bool,
) -> Foundation:
    """Freeze the network and put low-rank updates beside its linear layers: a PeftModel.

    What the checkpoint lacked (a new score layer, new control tokens) trains in full.

    Raises `ModelError` when an entry of `target_modules` matches no module, with the names that exist.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from ftcore.kernels.lora_linear import LoraLinear

    network = foundation.network
    if isinstance(target_modules, list):
        modules = [f".{name}" for name, _ in network.named_modules()]
        matches = {entry: sum(name.endswith(f".{entry}") for name in modules) for entry in target_modules}
        plain.print("Adapter modules: " + ", ".join(f"{entry} {count}" for entry, count in matches.items()))
        target_modules = [entry for entry in target_modules if matches[entry]]
        unmatched = [entry for entry, count in matches.items() if not count]
        if unmatched and not (allow_unmatched and target_modules):
            raise ModelError(
                f"adapter.target_modules: {', '.join(unmatched)} match nothing among the linear modules {_linear_names(network)}."
            )
    elif target_modules != "all-linear":
        raise ConfigError(f"adapter.target_modules is all-linear or a list of names, not {target_modules!r}.")
    _check_rank(rank, network)
    if load_in_4bit:
        network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        use_dora=use_dora,
        use_rslora=use_rslora,
        task_type="SEQ_CLS" if foundation.new_modules else None,
        modules_to_save=list(foundation.new_modules) or None,
        trainable_token_indices=list(foundation.new_tokens) or None,
    )
    if not load_in_4bit:
        config._register_custom_module({nn.Linear: LoraLinear})
    return replace(foundation, network=get_peft_model(network, config))


def full(foundation: Foundation, /) -> Foundation:
    """Every parameter trains."""
    foundation.network.requires_grad_(True)
    return foundation


def freeze(
    foundation: Foundation,
    /,
    *,
    top_layers: Annotated[int, Ge(1)],
    train_head: bool,
    keep_activations_gb: Annotated[float, Ge(0)],
) -> Foundation:
    """Train the last `top_layers` transformer blocks and what the checkpoint lacked; the rest is frozen."""
    network = foundation.network
    blocks = transformer_blocks(network)
    if top_layers > len(blocks):
        raise ModelError(f"adapter.top_layers={top_layers}, but the model has {len(blocks)} transformer blocks.")
    trained = [*blocks[-top_layers:], *(getattr(network, name) for name in foundation.new_modules)]
    trained += [network.get_input_embeddings()] if foundation.new_tokens else []
    trained += [network.get_output_embeddings()] if train_head and network.get_output_embeddings() is not None else []
    network.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    return replace(foundation, frozen_blocks=len(blocks) - top_layers, keep_activations_gb=keep_activations_gb)


def _check_rank(rank: int, network: nn.Module) -> None:
    """Raise `ConfigError` for a rank that no update of a layer can have."""
    highest = max((min(layer.weight.shape) for layer in _linear(network).values()), default=rank)  # type: ignore[arg-type]
    if rank > highest:
        raise ConfigError(
            f"adapter.rank={rank:,} is above {highest:,}, the highest rank that an update of the model's linear layers can have."
        )


def _linear_names(network: nn.Module) -> str:
    """Last parts of the names of linear layers, most frequent first."""
    return ", ".join(dict(Counter(name.rsplit(".", 1)[-1] for name in _linear(network)).most_common()))


def _linear(network: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by name."""
    return {name: module for name, module in network.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
