"""Processes that ftcore did not start: torchrun on two machines (here twice on one), and SLURM (submitit's local executor)."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import FAST, latest

WORDS = [*FAST, "max_steps=6", "global_batch_size=8"]


def torchrun(cwd, *words):
    """The command of docs/machines.md, once for each of two machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    command += [f"--rdzv-endpoint=localhost:{port}", "-m", "ftcore", *latest(*words)]
    machines = [subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [machine.communicate(timeout=120)[1] for machine in machines]
    return [machine.returncode for machine in machines], "".join(errors)


def shared_losses(folder):
    return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.processes
def test_two_machines_share_a_run_and_find_it_finished(ftcore, tmp_path):
    alone = [line["train/loss"] for line in ftcore(*WORDS, "hardware=cpu").metrics]
    machines = ["hardware=fsdp_2cpu", "hardware.devices=1", "hardware.num_nodes=2", "name=shared"]
    codes, errors = torchrun(tmp_path, *WORDS, *machines)
    assert codes == [0, 0], errors
    (folder,) = tmp_path.glob("runs/shared/*")
    assert shared_losses(folder) == pytest.approx(alone, abs=1e-5)
    codes, errors = torchrun(tmp_path, *WORDS, *machines, f"resume={folder}")
    assert codes == [0, 0], errors
    assert list(tmp_path.glob("runs/shared/*")) == [folder]


@pytest.mark.slow
@pytest.mark.processes
def test_what_the_first_process_refuses_ends_them_all_with_one_message(tmp_path):
    codes, errors = torchrun(
        tmp_path, *WORDS, "hardware=fsdp_2cpu", "hardware.devices=1", "hardware.num_nodes=2", "data=jsonl"
    )
    assert all(codes)
    assert errors.count("ConfigError: ") + errors.count("DataError: ") == 1, errors


def test_several_machines_without_torchrun_get_its_command(fails):
    message = fails(5, *WORDS, "hardware=fsdp_2cpu", "hardware.num_nodes=2")
    assert "torchrun --nnodes=2 --nproc-per-node=2" in message and "-m ftcore" in message


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the job's processes in /proc")
def test_a_slurm_job_that_is_interrupted_saves_and_begins_again_from_there(ftcore):
    words = ["hardware=slurm", "hardware.slurm.cluster=local", "hardware.accelerator=cpu", "hardware.precision=32-true"]
    words += ["hardware.devices=1", "hardware.strategy=single", "max_epochs=10", "max_steps=150"]
    words += ["checkpoints.every=null"]
    outcome = ftcore(*FAST, "global_batch_size=8", *words)
    assert outcome.status == 0, outcome.err
    job = int(re.search(r"Submitted as job (\d+)", outcome.out)[1])
    wait_for(lambda: (outcome.folder / "metrics.jsonl").is_file() and len(outcome.metrics) > 3, outcome)
    for process in Path(f"/proc/{job}/task/{job}/children").read_text().split():
        os.kill(int(process), signal.SIGUSR2)  # as SLURM does before it ends a job
    wait_for(lambda: (outcome.folder / "summary.json").is_file(), outcome)
    assert outcome.summary["steps"] == 150
    (saved,) = (outcome.folder / "checkpoints").glob("step-*")
    assert [line["step"] for line in outcome.metrics] == list(range(1, 151)) and saved.is_dir()


def wait_for(happened, outcome):
    deadline = time.monotonic() + 90
    while not happened():
        logs = "".join(file.read_text() for file in outcome.folder.glob("slurm/*.err"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)


def test_what_is_wrong_is_said_before_anything_is_submitted(fails, tmp_path):
    assert "nowhere.jsonl" in fails(3, "hardware=slurm", "model=tiny", "data=jsonl", "data.path=nowhere.jsonl")
    assert not (tmp_path / "runs").exists()


def test_a_cluster_without_slurm_says_so(fails, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "SLURM did not take the job" in fails(5, *FAST, "hardware=slurm")
