"""W&B's server goes away in the middle of a run: nothing changes, the run ends well, and its steps can be sent later."""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks.wandb_server import Server
from tests.conftest import FAST, latest


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
    files = re.search(r"wandb sync (\S+)", ended.stdout.replace("\n", " "))[1]
    back = Server(port=server.port)
    sync = [sys.executable, "-m", "wandb", "sync", files]
    subprocess.run(sync, cwd=tmp_path, env=environment, check=True, timeout=120)
    assert {step["trainer/global_step"] for step in back.steps if "train/loss" in step} == set(range(1, steps + 1))
    back.leave()
