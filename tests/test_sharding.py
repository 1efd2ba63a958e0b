"""A model in shares (FSDP2): it stops and goes on, also on another number of processes, and its result is like any other."""

import json
import shutil
from collections import Counter

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from ftcore.files import resolve
from ftcore.runs import launch
from ftcore.train import faults
from tests.ranks import observed_rank, read_in_shares

WORDS = [
    "model=tiny", "logger=none", "max_steps=6", "global_batch_size=8", "method.lr=1e-2", "evaluate.max_rows=4",
    "evaluate.max_new_tokens=2", "evaluate.probe=null", "checkpoints.every=2",
]  # fmt: skip
LONG = [pytest.mark.slow, pytest.mark.processes]


def weights(outcome):
    (file,) = outcome.folder.glob("model/*.safetensors")
    return load_file(file)


def losses(outcome):
    return [line["train/loss"] for line in outcome.metrics if "train/loss" in line]


def assert_alike(parted, whole):
    """The same losses and weights but for rounding."""
    assert losses(parted) == pytest.approx(losses(whole), abs=1e-6 * max(losses(whole)))
    one, other = weights(whole), weights(parted)
    assert one.keys() == other.keys()
    # Adam's early steps turn a rounding error of a gradient near zero into one of the size of the learning rate.
    assert all((one[name] - other[name]).abs().mean() < 1e-4 for name in one)


TWO, FOUR, ONE = ["hardware=fsdp_2cpu"], ["hardware=fsdp_2cpu", "hardware.devices=4"], ["hardware=cpu"]
COPIES = [*FOUR, "hardware.replicas=2"]


@pytest.mark.parametrize(
    ("adapter", "parts"),
    [
        ("lora", [(TWO, 4), (ONE, 0)]),
        pytest.param("full", [(TWO, 4), (ONE, 5), (FOUR, 7), (TWO, 9), (COPIES, 0)], marks=LONG),
        pytest.param("dora", [(COPIES, 4), (TWO, 5), (FOUR, 7), (ONE, 9), (TWO, 0)], marks=LONG),
    ],
)
def test_a_stopped_run_goes_on_in_shares_and_elsewhere_and_its_model_is_like_any_other(
    ftcore, monkeypatch, adapter, parts
):
    words = [*WORDS, f"adapter={adapter}", "validate_every=3", "data.validation_share=0.1", "keep_best=val/loss"]
    words.append("max_steps=10" if len(parts) > 2 else "max_steps=6")
    whole = ftcore(*words, "hardware=cpu", "name=whole")
    assert whole.status == 0, whole.err
    monkeypatch.setattr(launch, "run_rank", observed_rank)  # in which no pickle can be read
    for machine, step in parts:
        monkeypatch.setenv(faults.VARIABLE, f"disk_full step={step}" if step else "")
        parted = ftcore(*words, *machine, "name=parted", "resume=auto")
        assert parted.status == (7 if step else 0), parted.err
        if step == 4:
            files = [path.name for path in (parted.folder / "checkpoints/step-00000002").glob("*.safetensors")]
            assert len(files) == (4 if machine is COPIES else 2)
    assert_alike(parted, whole)
    assert ftcore("export", f"run={parted.folder}").status == 0


@pytest.fixture
def deep(tmp_path):
    """Words for a model of six blocks, so that two of them are not all."""
    shutil.copytree(resolve("ftcore://tiny"), tmp_path / "deep")
    file = tmp_path / "deep" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 6}))
    return [f"model.path={file.parent}"]


CASES = [
    pytest.param(method, adapter, processes, marks=[] if (method, adapter, processes) == ("sft", "full", 2) else LONG)
    for method in ("sft", "self_supervised", "reward", "dpo")
    for adapter in ("lora", "full")
    for processes in (2, 4)
]


@pytest.mark.parametrize(("method", "adapter", "processes"), CASES)
def test_no_training_step_gathers_the_model_or_keeps_whole_gradients(
    ftcore, monkeypatch, deep, method, adapter, processes
):
    monkeypatch.setattr(launch, "run_rank", observed_rank)
    machine = ["hardware=fsdp_2cpu", f"hardware.devices={processes}", "micro_batch_size=1"]
    words = [*WORDS, *deep, *machine, f"method={method}", f"adapter={adapter}", "max_steps=3", "evaluate.enabled=false"]
    outcome = ftcore(*words, "validate_every=2", "data.validation_share=0.1")
    assert outcome.status == 0, outcome.err
    notes = [json.loads(file.read_text()) for file in outcome.folder.glob("gathered-*.json")]
    assert len(notes) == processes
    for note in notes:
        networks, rest = divmod(len(note["groups"]), 7)  # the policy, and the base model where all weights train
        assert networks == (1 if adapter == "lora" or method == "reward" else 2) and not rest
        (block, _), *_ = Counter(note["groups"]).most_common()
        around = sum(note["groups"]) - 6 * networks * block
        assert note["peak"] <= around + 2 * block < sum(note["groups"])
        assert not note["whole_gradients"]  # of the four micro-batches of a step


@pytest.mark.slow
@pytest.mark.processes
def test_a_process_reads_its_own_rows_of_the_blocks(tmp_path):
    """Blocks as Llama 3 8B has them, of random weights, and few of them."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=1000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=3, num_attention_heads=32,
        num_key_value_heads=8, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        from transformers import LlamaForCausalLM

        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).named_parameters()}
    save_file(
        {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    around = 2 * 2 * 1000 * 4096
    torch.multiprocessing.spawn(read_in_shares, (2, tmp_path), nprocs=2)
    peaks = [int((tmp_path / f"peak-{rank}.txt").read_text()) for rank in range(2)]
    assert all(size / 2 < peak < size / 2 + around + 0.15 * size for peak in peaks), [peak / size for peak in peaks]
