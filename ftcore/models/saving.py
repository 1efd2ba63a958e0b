"""The model that a run leaves: the adapter or all weights, in Hugging Face layout, also of a network in shares."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from ftcore.files import to_json, write_text
from ftcore.machine.processes import rank_and_world
from ftcore.models import sharding
from ftcore.models.base_name import Base
from ftcore.models.foundation import Foundation, merged
from ftcore.models.precision import cast_weights

# Bytes of weights in a file, and in the memory of the process that writes it.
LARGEST = "5GB"


def save_model(foundation: Foundation, folder: Path, base: Base, card: str) -> None:
    """Write the adapter or the full model, with its tokenizer and card, in Hugging Face layout, complete or not at all.

    An adapter names its `base` as others can find it. Files are as readable as their folder. Every process must call this; the
    first one writes.
    """
    if foundation.merged_run:  # an adapter alone would name the weights before the earlier run as its base
        foundation = merged(foundation)
    partial, first = folder.with_name(folder.name + ".partial"), rank_and_world()[0] == 0
    if foundation.has_adapter:
        _write_adapter(foundation, partial, base, first)
    else:
        cast_weights(foundation.network, "32-true")
        _write_weights(foundation.network, partial, first)
    if not first:
        return
    foundation.tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    for file in partial.glob("*.safetensors"):
        with suppress(OSError):  # some file systems have no permissions
            file.chmod(0o666 & partial.stat().st_mode)  # safetensors lets only the owner read them
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was stopped right after this
    partial.rename(folder)


def _write_adapter(foundation: Foundation, folder: Path, base: Base, first: bool) -> None:
    """Write what trained beside the frozen weights."""
    network = foundation.network
    settings = network.active_peft_config
    settings.base_model_name_or_path, settings.revision = base.name, base.revision
    trained = {
        name: sharding.full_tensor(value.detach()) for name, value in network.named_parameters() if value.requires_grad
    }
    if first:
        network.save_pretrained(folder, state_dict=trained, save_embedding_layers=False)


def _write_weights(network: Any, folder: Path, first: bool) -> None:
    """Write a model's files one after the other, so that no process ever holds more than one of them whole."""
    once = dict[int, tuple[str, torch.Tensor]]()
    for name, value in network.state_dict(keep_vars=True).items():
        once.setdefault(id(value), (name, value.detach()))  # tied weights by their first name
    state = revert_weight_conversion(network, dict(once.values()))
    sizes = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in state.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=LARGEST)
    if first:
        network.save_pretrained(folder, state_dict={})  # what goes with the weights
    for file, names in plan.filename_to_tensors.items():
        values = {}
        for name in names:
            value = sharding.full_tensor(state[name])
            if first:
                values[name] = value.cpu().contiguous()
        if first:
            save_file(values, folder / file, metadata={"format": "pt"})
    if first and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", to_json(index))
