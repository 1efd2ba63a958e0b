"""A device that is too small: the message has the arithmetic, and micro_batch_size=auto finds one that fits."""

import signal
import weakref

import pytest

from ftcore.machine.hardware import smaller
from ftcore.train import faults
from ftcore.train import prepare as train
from ftcore.train import run as train_run
from ftcore.train.resume import SIGNALS
from tests.conftest import FAST

WORDS = [*FAST, "max_steps=3", "global_batch_size=8", "evaluate.enabled=false", "checkpoints.every=1"]


@pytest.mark.parametrize(("rows", "size", "processes", "less"), [(24, 6, 2, 4), (24, 12, 1, 8), (8, 1, 1, None)])
def test_the_next_smaller_size_keeps_the_rows_of_a_step(rows, size, processes, less):
    assert smaller(global_batch_size=rows, micro_batch_size=size, processes=processes) == less


def test_auto_goes_on_with_a_size_that_fits_and_the_losses_are_the_same(ftcore, monkeypatch):
    before = ftcore(*WORDS, "hardware=cpu")
    monkeypatch.setenv(faults.VARIABLE, "out_of_memory step=2")
    after = ftcore(*WORDS, "hardware=cpu", "name=after")
    assert after.status == 0, after.err
    assert [f"micro_batch_size={n} keeps every number: 8 = {n} x 1 processes" in after.err for n in (4, 2, 1)] == [
        True
    ] * 3
    pairs = zip(before.metrics, after.metrics, strict=True)
    assert all(abs(a["train/loss"] - b["train/loss"]) < 1e-5 for a, b in pairs)


def test_with_a_size_of_the_users_own_checkpointing_of_activations_comes_next(fails, monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "out_of_memory step=2")  # with more than one row, whatever is kept of them
    tuned, tune = [], train._tune
    monkeypatch.setattr(train, "_tune", lambda n, h: tuned.append(h["activation_checkpointing"]) or tune(n, h))
    message = fails(5, *WORDS, "hardware=cpu", "micro_batch_size=4")
    assert "Going on with hardware.activation_checkpointing=true." in message and tuned == ["auto", True]


def test_a_size_of_the_users_own_is_refused_with_what_would_fit(fails, monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "out_of_memory step=2")
    message = fails(5, *WORDS, "hardware=cpu", "micro_batch_size=4", "hardware.activation_checkpointing=false")
    assert "4 rows of up to" in message and "micro_batch_size=2 keeps every number: 8 = 2 x 1 processes x 4" in message


@pytest.mark.slow
@pytest.mark.processes
def test_auto_finds_a_size_for_several_processes(ftcore, monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "out_of_memory step=2 process=1")
    outcome = ftcore(*WORDS, "hardware=ddp_2cpu")
    assert outcome.status == 0, outcome.err
    assert "micro_batch_size=2" in outcome.err and len(outcome.metrics) == 3


def test_a_run_that_failed_is_gone_when_the_next_begins(ftcore, monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "out_of_memory step=2")
    made, left, prepare = [], [], train_run.prepare

    def noted(*arguments):
        left.append([type(part()).__name__ for part in made if part()])
        job = prepare(*arguments)
        made.extend(map(weakref.ref, (job.method, job.method.network, job.batches)))
        return job

    monkeypatch.setattr(train_run, "prepare", noted)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    assert ftcore(*WORDS, "hardware=cpu").status == 0
    assert left == [[], [], [], []]  # 8, 4, 2 and 1 rows
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
