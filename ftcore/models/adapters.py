"""Which parameters train: low-rank adapters (peft), all, or the top layers."""

from collections import Counter
from dataclasses import replace
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt

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
    from torch.nn import Linear

    from ftcore.kernels.lora_linear import LoraLinear

    network = foundation.network
    if isinstance(target_modules, list):
        matches = _matches(network, target_modules)
        print("Adapter modules: " + ", ".join(f"{name} {count}" for name, count in matches.items()))
        unmatched = [name for name, count in matches.items() if not count]
        if unmatched and (not allow_unmatched or len(unmatched) == len(matches)):
            raise ModelError(
                f"adapter.target_modules: {', '.join(unmatched)} match nothing in this model. Its linear modules: "
                f"{', '.join(_linear_names(network))}."
            )
        target_modules = [name for name in target_modules if name not in unmatched]
    elif target_modules != "all-linear":
        raise ConfigError(f"adapter.target_modules is all-linear or a list of names, not {target_modules!r}.")
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
        config._register_custom_module({Linear: LoraLinear})
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
    network.requires_grad_(False)
    for block in blocks[-top_layers:]:
        block.requires_grad_(True)
    for name in foundation.new_modules:
        getattr(network, name).requires_grad_(True)
    if foundation.new_tokens:
        network.get_input_embeddings().requires_grad_(True)
    if train_head and network.get_output_embeddings() is not None:
        network.get_output_embeddings().requires_grad_(True)
    return replace(foundation, frozen_blocks=len(blocks) - top_layers, keep_activations_gb=keep_activations_gb)


def _matches(network: Any, names: list[str]) -> dict[str, int]:
    """Entry -> number of modules whose dotted name ends in it."""
    modules = [name for name, _ in network.named_modules()]
    return {entry: sum(m == entry or m.endswith(f".{entry}") for m in modules) for entry in names}


def _linear_names(network: Any) -> list[str]:
    """Last parts of the names of linear layers, most frequent first."""
    kinds = ("Linear", "Conv1D")
    return [
        n
        for n, _ in Counter(
            n.rsplit(".", 1)[-1] for n, m in network.named_modules() if type(m).__name__ in kinds
        ).most_common()
    ]
