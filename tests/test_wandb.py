"""W&B's server goes away in the middle of a run: nothing changes, the run ends well, and its steps can be sent later."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from benchmarks.wandb_server import Server
from ftcore.train import faults
from tests.conftest import FAST, latest
from tests.test_run import offline_records


@pytest.mark.slow
def test_a_server_that_goes_away_changes_nothing_and_gets_the_steps_later(tmp_path):
    server, steps = Server(leave_after=5), 1500  # the client sends every 15 s: a run must take longer
    words = [
        *FAST,
        "hardware=cpu",
        "global_batch_size=8",
        "max_epochs=100",
        f"max_steps={steps}",
        "name=lost",
        "logger=wandb",
    ]
    environment = os.environ | server.environment()
    command = [sys.executable, "-m", "ftcore", *latest(*words)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert 5 <= len(server.steps) < steps
    (folder,) = tmp_path.glob("runs/lost/*")
    assert json.loads((folder / "summary.json").read_text())["steps"] == steps
    printed = re.search(r"upload the steps with: wandb (sync .+)", ended.stdout)[1]
    back = Server(port=server.port)
    sync = [sys.executable, "-m", "wandb", *shlex.split(printed)]
    subprocess.run(sync, cwd=tmp_path, env=environment, check=True, timeout=120)
    assert {step["trainer/global_step"] for step in back.steps if "train/loss" in step} == set(range(1, steps + 1))
    back.leave()


def test_a_resumed_run_has_every_step_in_its_last_offline_file(ftcore, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = [
        *FAST,
        "logger=wandb",
        "max_steps=6",
        "checkpoints.every=2",
        "evaluate.enabled=false",
        "name=stopped",
        "resume=auto",
    ]
    monkeypatch.setenv(faults.VARIABLE, "raise process=0 step=4")
    with pytest.raises(RuntimeError, match="a fault that was asked for"):
        ftcore(*words)
    monkeypatch.delenv(faults.VARIABLE)
    outcome = ftcore(*words)
    assert outcome.status == 0, outcome.err
    first, last = sorted(outcome.folder.glob("wandb/offline-run-*"), key=lambda folder: folder.stat().st_mtime)
    assert str(last) in "".join(outcome.out.split())
    shutil.rmtree(first)
    rows = [
        {item.key or item.nested_key[0]: item.value_json for item in r.history.item}
        for r in offline_records(outcome.folder)
    ]
    steps = [json.loads(row["trainer/global_step"]) for row in rows if "train/loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("mode", ["", "evil"])
def test_a_wrong_mode_in_the_environment_is_refused_before_weights_are_loaded(fails, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    words = [word for word in FAST if not word.startswith("logger")]
    message = fails(2, *words, "logger=wandb", "max_steps=1")
    assert f"WANDB_MODE={mode!r} is none of online, offline" in message
