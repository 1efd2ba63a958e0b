"""Every method in shares, from an empty home to summary.json: what a user rehearses before a machine of eight GPUs."""

import pytest

from ftcore.config.options import options

WORDS = ["model=tiny", "logger=none", "max_steps=2", "evaluate.max_rows=8", "evaluate.max_new_tokens=4"]
# A model in shares needs care where a loss reads something else than logits, and where a frozen copy stands beside it.
DELICATE = ["reward", "dpo", "ipo", "slic", "kto"]

pytestmark = [pytest.mark.slow, pytest.mark.processes]


@pytest.fixture(autouse=True)
def empty_home(monkeypatch, tmp_path):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path / "home"))


def finishes(ftcore, *words):
    outcome = ftcore(*words)
    assert outcome.status == 0, outcome.err
    assert outcome.summary["steps"] == 2 and outcome.summary["base"] and outcome.summary["tuned"]
    return outcome.summary


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("method", options("method"))
def test_every_method_runs_in_two_shares(ftcore, method, adapter):
    summary = finishes(ftcore, *WORDS, f"method={method}", f"adapter={adapter}", "hardware=fsdp_2cpu")
    assert summary["processes"] == 2


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("method", DELICATE)
def test_delicate_methods_run_in_eight_shares(ftcore, method, adapter):
    eight = ["hardware=fsdp_2cpu", "hardware.devices=8"]
    assert finishes(ftcore, *WORDS, f"method={method}", f"adapter={adapter}", *eight)["processes"] == 8


@pytest.mark.parametrize("processes", [2, 8])
def test_the_first_example_runs_as_rehearsed(ftcore, processes):
    machine = ["hardware=fsdp_8gpu", "hardware.accelerator=cpu", f"hardware.devices={processes}"]
    summary = finishes(ftcore, "method=rlhf", "data=medical", *machine, *WORDS)
    assert summary["processes"] == processes
