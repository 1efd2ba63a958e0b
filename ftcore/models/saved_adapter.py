"""A saved adapter, put into the network that the run's own config builds.

peft alone would build whatever adapter_config.json describes, load the tensors that fit and leave the others out. Here the file
describes nothing: it must agree with what was built, and every tensor must be there, be finite and have a place.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ftcore.errors import ModelError, model_errors, printable
from ftcore.models.weights import check_length

# Keys of adapter_config.json that say nothing about the weights. peft writes them for others; they are never read here.
NOT_READ = {"base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version"}


def load_adapter(network: Any, folder: Path) -> None:
    """Load the tensors of `folder` into the adapter of a PeftModel.

    Raises `ModelError` that lists what is missing, left over, of another shape or not finite, or what is described otherwise.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    _check_description(network.active_peft_config, folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    check_length(file)
    with model_errors(file, " as an adapter"):
        found, wanted = load_file(file), get_peft_model_state_dict(network, save_embedding_layers=False)
        if faults := _faults(found, wanted):
            raise ModelError(f"{file} is not the adapter that the run's config.yaml describes: {faults}.")
        placed: Any = set_peft_model_state_dict(network, found)
    assert not placed.unexpected_keys, placed.unexpected_keys


def _faults(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """How many tensors are wrong in which way, with the first names; "" when all are right."""
    both = wanted.keys() & found.keys()
    faults = {
        "missing": wanted.keys() - found.keys(),
        "left over": found.keys() - wanted.keys(),
        "of another shape": {name for name in both if found[name].shape != wanted[name].shape},
        "not finite": {name for name in both if not found[name].isfinite().all()},
    }
    listed = ((len(names), fault, ", ".join(sorted(names)[:3])) for fault, names in faults.items() if names)
    return "; ".join(f"{count} of {len(wanted)} tensors {fault} ({printable(names)})" for count, fault, names in listed)


def _check_description(built: Any, file: Path) -> None:
    """Refuse an adapter_config.json that says other things than the adapter that was built."""
    ours, usual = built.to_dict(), type(built)().to_dict()
    with model_errors(file):
        theirs = json.loads(file.read_text(encoding="utf-8"))
        # Versions of peft add keys: one that is not there is as usual.
        keys = {*theirs, *(key for key in ours if ours[key] != usual[key])} - NOT_READ
        wrong = sorted(key for key in keys if _comparable(theirs.get(key)) != _comparable(ours.get(key)))
    if wrong:
        raise ModelError(
            f"{file}: {printable(', '.join(wrong[:5]))} {'is' if len(wrong) == 1 else 'are'} not as in the run's config.yaml, "
            "by which it was trained. Put the file back, or train again."
        )


def _comparable(value: object) -> object:
    """A value of the file or of peft's own: sets have no order, and what is empty or false is the same as nothing."""
    return sorted(map(str, value)) if isinstance(value, list | set) else value or None
