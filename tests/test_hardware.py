"""The machine is checked before anything is loaded, and batch sizes that do not divide print their arithmetic."""

import pytest
import torch

from ftcore.errors import ConfigError, HardwareError
from ftcore.machine import hardware
from ftcore.machine.hardware import find_machine, micro_batch
from ftcore.settings import Machine, Resolved
from ftcore.train import run as train_run

CPU = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "single", "replicas": 1, "precision": "32-true"}
CPU |= {"activation_checkpointing": False, "compile": False, "slurm": None}


@pytest.mark.parametrize(
    ("rows", "processes", "expected"), [(16, 1, 16), (16, 2, 8), (16, 8, 2), (64, 1, 16), (12, 1, 12), (34, 2, 1)]
)
def test_auto_takes_the_largest_even_share_up_to_sixteen_rows(rows, processes, expected):
    assert micro_batch(global_batch_size=rows, micro_batch_size="auto", processes=processes) == expected


def test_batches_that_cannot_be_dealt_evenly_print_the_arithmetic():
    with pytest.raises(ConfigError, match=r"3 x 2 = 6. Nearest global_batch_size: 12 or 18; .* fits 16: 1, 2, 4, 8"):
        micro_batch(global_batch_size=16, micro_batch_size=3, processes=2)
    with pytest.raises(ConfigError, match=r"Nearest global_batch_size: 9"):
        micro_batch(global_batch_size=5, micro_batch_size="auto", processes=9)


def test_options_become_the_machine_that_is_there():
    assert find_machine(**CPU | {"accelerator": "auto"}).accelerator == ("gpu" if hardware.cuda_devices() else "cpu")
    assert find_machine(**CPU | {"devices": 2, "num_nodes": 3, "strategy": "ddp"}).processes == 6


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"devices": 2}, ConfigError),
        ({"precision": "16-mixed"}, HardwareError),
        ({"strategy": "fsdp"}, ConfigError),
        ({"strategy": "fsdp", "devices": 6, "replicas": 4}, ConfigError),
        ({"strategy": "fsdp", "devices": 2, "replicas": 2}, ConfigError),
        ({"strategy": "ddp", "devices": 4, "replicas": 2}, ConfigError),
        ({"strategy": "fsdp", "devices": 2, "precision": "16-mixed"}, ConfigError),
    ],
)
def test_what_cannot_run_is_refused(changes, error):
    with pytest.raises(error):
        find_machine(**CPU | changes)


def test_a_machine_with_fewer_gpus_than_asked_for_says_both_numbers(monkeypatch):
    monkeypatch.setattr(hardware, "cuda_devices", lambda: 4)
    with pytest.raises(HardwareError, match="needs 8 CUDA devices per machine and this one has 4"):
        find_machine(**CPU | {"accelerator": "gpu", "devices": 8, "strategy": "ddp"})


@pytest.mark.parametrize(
    ("accelerator", "rank", "expected"), [("gpu", "3", [3, "load"]), ("gpu", None, [0, "load"]), ("cpu", "3", ["load"])]
)
def test_each_process_takes_its_own_gpu_before_anything_is_loaded(monkeypatch, accelerator, rank, expected):
    """Otherwise 4-bit weights of all processes, which are loaded at once, lie on the first."""
    done = []

    def load(*_):
        done.append("load")
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(train_run, "prepare", load)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    resolved = Resolved(Machine(accelerator, 4, 1, "ddp", "bf16-true"), micro_batch_size=1, base="")
    with pytest.raises(InterruptedError):
        train_run.run({"logger": None}, resolved, None)
    assert done == expected
