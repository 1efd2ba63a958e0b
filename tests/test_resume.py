"""A run that was stopped goes on as if nothing had happened, wherever it was stopped; what cannot go on says why."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from ftcore.errors import StorageError
from ftcore.run_folder import Run
from ftcore.train import before_after, checkpoint, faults
from tests.conftest import FAST, latest

WORDS = [*FAST, "hardware=cpu", "adapter.dropout=0.1", "global_batch_size=8", "max_steps=8", "checkpoints.every=2"]
MORE = ["retention.every=2", "validate_every=3", "keep_best=val/loss", "data.validation_share=0.1", "ledger=true"]
# What the first process writes.
OWN = "shard-00001-model-00001-of-00001.safetensors"
METHODS = {
    "sft": MORE,
    "reward": [],
    "dpo": [],
    "grpo": ["method.rewards=[repetition]", "method.reward_options.repetition.n=1", "method.max_new_tokens=6"],
    "rlhf": [
        "method.stages.policy=['method=sft','max_steps=1']",
        "method.stages.reward_model=['method=reward','max_steps=1']",
        "method.max_new_tokens=6",
    ],
}


@pytest.fixture
def stops(ftcore, monkeypatch):
    """Run a command that a fault ends."""

    def run(fault, *words):
        monkeypatch.setenv("FTCORE_FAULTS", fault)
        with pytest.raises(RuntimeError, match="asked for"):
            ftcore(*words)
        monkeypatch.delenv("FTCORE_FAULTS")

    return run


def left(outcome):
    """What a run leaves: weights, and the losses of its steps."""
    assert outcome.status == 0, outcome.err
    weights = [file.read_bytes() for file in sorted(outcome.folder.glob("model/*.safetensors"))]
    return weights, [(line["step"], line["train/loss"]) for line in outcome.metrics if "train/loss" in line]


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] * (m in ("rlhf", "reward"))) for m in METHODS]
)
def test_a_run_that_died_goes_on_to_the_same_weights_to_the_bit(ftcore, stops, method, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path_factory.getbasetemp() / "home"))  # stages are made once
    words = [*WORDS, f"method={method}", *METHODS[method]]
    stops("raise step=6", *words, "name=stopped")
    resumed = ftcore(*words, "name=stopped", "resume=auto")
    assert "Going on after step 4 of 8" in resumed.out
    assert left(resumed) == left(ftcore(*words, "name=whole"))
    assert len(list(resumed.folder.parent.iterdir())) == 1


def test_a_finished_run_says_so_and_stays_as_it_is(ftcore):
    first = ftcore(*WORDS, "max_steps=2")
    before = {file: file.stat().st_mtime_ns for file in first.folder.rglob("*")}
    again = ftcore(f"resume={first.folder}")
    assert again.status == 0 and "is finished" in again.out
    assert before == {file: file.stat().st_mtime_ns for file in first.folder.rglob("*")}


def test_other_settings_are_shown_and_refused_unless_they_are_safe(ftcore, stops, fails):
    stops("raise step=4", *WORDS)
    message = fails(2, *WORDS, "method.lr=1e-3", "seed=3", "resume=auto")
    assert "method.lr: 0.00" in message and "-> 0.001" in message and "seed: 0 -> 3" in message
    outcome = ftcore(*WORDS, "max_steps=6", "micro_batch_size=4", "resume=auto")
    assert outcome.status == 0 and outcome.summary["steps"] == 6


@pytest.mark.parametrize("name", ["nowhere", "runs"])
def test_a_folder_that_is_no_run_cannot_be_gone_on_with(fails, name):
    assert "is not a run folder" in fails(2, *WORDS, f"resume={name}")


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(ftcore, stops):
    stops("raise step=6", *WORDS)
    (folder,) = ftcore("--help").folder.parent.glob("*")
    newest = folder / "checkpoints" / "step-00000004" / OWN
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    outcome = ftcore(*WORDS, "resume=auto")
    assert f"step-00000004 is damaged ({OWN} has changed)" in outcome.err
    assert "Going on after step 2 of 8" in outcome.out
    assert left(outcome) == left(ftcore(*WORDS, "name=whole"))


@pytest.mark.parametrize("hurt", ["cut", "delete", "flip"])
def test_damage_of_any_file_is_seen(tmp_path, hurt):
    for step in (1, 2):
        checkpoint.write(
            tmp_path / "checkpoints", step, {"weight/a": torch.full((50, 50), step)}, {"step": step}, keep=1
        )
    before, newest = sorted((tmp_path / "checkpoints").iterdir())
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        flipped = bytes([content[0] ^ 1]) + content[1:]
        file.unlink() if hurt == "delete" else file.write_bytes(content[:-1] if hurt == "cut" else flipped)
        assert checkpoint.newest(tmp_path / "checkpoints") == before, file.name
        file.write_bytes(content)
        assert checkpoint.newest(tmp_path / "checkpoints") == newest


def test_what_the_disk_refuses_is_named_and_the_checkpoint_before_stays(tmp_path):
    checkpoint.write(tmp_path / "checkpoints", 1, {"weight/a": torch.zeros(5)}, {"step": 1}, keep=1)
    before, limits = checkpoint.newest(tmp_path / "checkpoints"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(
            StorageError,
            match=r"not written: File too large \(.*step-00000002\).* are free",
        ):
            checkpoint.write(tmp_path / "checkpoints", 2, {"weight/a": torch.zeros(50, 50)}, {"step": 2}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.newest(tmp_path / "checkpoints") == before and list(before.parent.iterdir()) == [before]


def test_a_full_disk_keeps_the_checkpoints_before_and_the_run_goes_on(ftcore, stops, monkeypatch):
    monkeypatch.setenv("FTCORE_FAULTS", "disk_full step=4 point=save; raise step=6")
    with pytest.raises(RuntimeError, match="asked for"):
        ftcore(*WORDS)
    monkeypatch.delenv("FTCORE_FAULTS")
    outcome = ftcore(*WORDS, "resume=auto")
    assert "Going on after step 2 of 8" in outcome.out
    assert left(outcome) == left(ftcore(*WORDS, "name=whole"))


def test_a_full_disk_stops_the_run_where_that_is_wanted(fails, monkeypatch):
    monkeypatch.setenv("FTCORE_FAULTS", "disk_full step=2 point=save")
    message = fails(7, *WORDS, "checkpoints.on_error=stop")
    assert "No space left on device" in message and "are free" in message


def test_bad_losses_are_left_out_with_the_rows_named_and_too_many_end_the_run(ftcore, fails, monkeypatch):
    bad = [f"nan step={step}" for step in (3, 4, 5, 6)]
    monkeypatch.setenv("FTCORE_FAULTS", bad[0])
    outcome = ftcore(*WORDS)
    assert outcome.status == 0 and outcome.summary["steps"] == 8 and "Step 3 is not finite (rows " in outcome.err
    assert all(torch.isfinite(torch.tensor(line["train/loss"])) for line in outcome.metrics if line["step"] != 3)
    monkeypatch.setenv("FTCORE_FAULTS", ";".join(bad))
    fails(6, *WORDS)


def started(folder, *words, **environment):
    """A run in a process of its own, once it trains."""
    command = [sys.executable, "-m", "ftcore", *latest(*WORDS, "max_steps=2000", *words)]
    run = subprocess.Popen(command, cwd=folder, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(file.read_text().count("\n") > 2 for file in folder.glob("runs/*/*/metrics.jsonl")):
        assert run.poll() is None and time.monotonic() < deadline, run.stderr.read()
        time.sleep(0.05)
    return run


def test_a_signal_saves_and_ends_the_run_and_nobody_else_may_work_in_its_folder(tmp_path, fails):
    run = started(tmp_path, "checkpoints.every=null")
    assert f"in use by process {run.pid}" in fails(7, *WORDS, "max_steps=2000", "checkpoints.every=null", "resume=auto")
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 128 + signal.SIGTERM
    message = run.stderr.read()
    (folder,) = tmp_path.glob("runs/*/*")
    steps = (folder / "metrics.jsonl").read_text().splitlines()
    (saved,) = checkpoint.folders(folder / "checkpoints")
    assert checkpoint.read_state(saved)["step"] == json.loads(steps[-1])["step"] and f"resume={folder}" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("label", ["base model", "tuned model"])
def test_a_signal_ends_the_comparison_at_once_and_the_run_goes_on_later(
    ftcore, fails, monkeypatch, tmp_path, label, number
):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path / "home"))  # without scores of other tests
    score = before_after.score

    def interrupted(*given):
        if given[-1] == label:
            signal.raise_signal(number)
            pytest.fail("the comparison goes on")
        return score(*given)

    with monkeypatch.context() as patched:
        patched.setattr(before_after, "score", interrupted)
        message = fails(128 + number, *WORDS)
    assert number.name in message and "Go on with resume=" in message
    assert ftcore(*WORDS, "resume=auto").status == 0


def test_a_run_that_goes_on_with_other_steps_writes_them_down_says_so_and_is_not_packed(ftcore, fails, monkeypatch):
    words = [*FAST, "checkpoints.every=2", "evaluate.max_rows=4", "name=longer", "resume=auto"]
    monkeypatch.setenv(faults.VARIABLE, "raise process=0 step=5")
    with pytest.raises(RuntimeError, match="a fault that was asked for"):
        ftcore(*words, "max_steps=6")
    monkeypatch.delenv(faults.VARIABLE)
    outcome = ftcore(*words, "max_steps=12")
    assert outcome.status == 0, outcome.err
    said = " ".join(outcome.out.split())
    assert "Going on otherwise than the run began (max_steps: 6 -> 12): its schedule is another from here on." in said
    assert re.search(r"Learning rate: \S+ in step 4, \S+ in step 5", said)
    assert Run(outcome.folder).config["max_steps"] == 12 and len(outcome.metrics) == 12
    message = fails(2, "pack", f"run={outcome.folder}", "output_dir=packed")
    assert "max_steps: 6 -> 12" in message and "no recipe gives it again" in message


def test_a_run_that_goes_on_on_another_machine_is_packed(ftcore, monkeypatch):
    words = [*FAST, "checkpoints.every=2", "evaluate.max_rows=4", "name=moved", "resume=auto", "max_steps=6"]
    monkeypatch.setenv(faults.VARIABLE, "raise process=0 step=5")
    with pytest.raises(RuntimeError, match="a fault that was asked for"):
        ftcore(*words)
    monkeypatch.delenv(faults.VARIABLE)
    outcome = ftcore(*words, "checkpoints.keep=3")
    assert outcome.status == 0, outcome.err
    assert "Going on otherwise" not in outcome.out
    assert ftcore("pack", f"run={outcome.folder}", "output_dir=packed").status == 0
