"""A model in shares (FSDP2): it stops and goes on, also on another number of processes, and its result is like any other."""

import pytest
import torch
from safetensors.torch import load_file

from ftcore.train import faults

WORDS = [
    "model=tiny", "logger=none", "max_steps=6", "global_batch_size=8", "method.lr=1e-2", "evaluate.max_rows=4",
    "evaluate.max_new_tokens=2", "evaluate.probe=null", "checkpoints.every=2",
]  # fmt: skip


def weights(outcome):
    (file,) = outcome.folder.glob("model/*.safetensors")
    return load_file(file)


def losses(outcome):
    return [line["train/loss"] for line in outcome.metrics if "train/loss" in line]


SHORT = [("fsdp_2cpu", 4), ("cpu", 0)]
LONG = [("fsdp_2cpu", 4), ("cpu", 5), ("fsdp_2cpu", 0)]


@pytest.mark.parametrize(
    ("adapter", "parts"), [("lora", SHORT), pytest.param("full", LONG, marks=[pytest.mark.slow, pytest.mark.processes])]
)
def test_a_stopped_run_goes_on_in_shares_and_elsewhere_and_its_model_is_like_any_other(
    ftcore, monkeypatch, adapter, parts
):
    words = [*WORDS, f"adapter={adapter}", "validate_every=3", "data.validation_share=0.1", "keep_best=val/loss"]
    whole = ftcore(*words, "hardware=cpu", "name=whole")
    assert whole.status == 0, whole.err
    for machine, step in parts:
        monkeypatch.setenv(faults.VARIABLE, f"disk_full step={step}" if step else "")
        parted = ftcore(*words, f"hardware={machine}", "name=parted", "resume=auto")
        assert parted.status == (7 if step else 0), parted.err
        if step == 4:
            assert (parted.folder / "checkpoints/step-00000002/process-1.safetensors").is_file()
    assert losses(parted) == pytest.approx(losses(whole), abs=1e-6 * max(losses(whole)))
    one, other = weights(whole), weights(parted)
    assert one.keys() == other.keys()
    # Adam's early steps turn a rounding error of a gradient near zero into one of the size of the learning rate.
    assert all((one[name] - other[name]).abs().mean() < 1e-4 for name in one)
    assert ftcore("export", f"run={parted.folder}").status == 0


def test_the_other_processes_build_the_network_without_storage(monkeypatch):
    from ftcore.config.build import build
    from ftcore.config.compose import load_config
    from ftcore.models.foundation import Foundation
    from ftcore.models.sharding import without_storage
    from ftcore.runs.resolve import resolve

    monkeypatch.setenv("RANK", "1")
    config = load_config(["model=tiny", "hardware=fsdp_2cpu"])
    with without_storage(resolve(config, {}).machine):
        foundation = build(config["model"], Foundation, "CausalLM", False)
        foundation = build(config["adapter"], Foundation, foundation)
    assert all(parameter.device == torch.device("meta") for parameter in foundation.network.parameters())
