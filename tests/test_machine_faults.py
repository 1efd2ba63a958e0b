"""What machines do to a run: full disks, clocks set back, closed terminals, processes that hang, others in the same folder."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftcore.files import whole_file
from ftcore.run_folder import Run
from ftcore.runs import folder as run_folders
from ftcore.sharing import pack
from ftcore.train import checkpoint
from tests.conftest import FAST, latest

WORDS = [*FAST, "hardware=cpu", "max_steps=1"]
ENDLESS = [*WORDS, "max_steps=100000", "max_epochs=null"]


def begun(cwd, *words, **options):
    """A command in a process of its own."""
    command = [sys.executable, "-m", "ftcore", *latest(*words)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def trains(process, cwd, steps=2):
    """Wait until a run has done some steps."""
    deadline = time.monotonic() + 120
    while not any(file.read_text().count("\n") >= steps for file in cwd.glob("runs/*/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run that no test changes."""
    cwd = tmp_path_factory.mktemp("finished")
    _, err = (process := begun(cwd, *WORDS)).communicate()
    assert process.returncode == 0, err
    (folder,) = cwd.glob("runs/*/*")
    return folder


def test_a_closed_terminal_ends_a_run_with_a_checkpoint(tmp_path):
    run = begun(
        tmp_path, *ENDLESS, "checkpoints.every=null", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    )
    trains(run, tmp_path)
    run.send_signal(signal.SIGHUP)
    _, err = run.communicate(timeout=60)
    (folder,) = tmp_path.glob("runs/*/*")
    assert run.returncode == 128 + signal.SIGHUP and "SIGHUP" in err and len(checkpoint.folders(folder / "checkpoints"))


def test_nohup_lets_a_run_outlive_its_terminal(tmp_path):
    run = begun(tmp_path, *ENDLESS, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    trains(run, tmp_path)
    run.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        run.communicate(timeout=2)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM


def test_a_process_that_hangs_shows_where_and_ends_as_a_fault_of_the_machine(tmp_path):
    run = begun(tmp_path, *WORDS, "max_steps=3", "hang_timeout=2", env=os.environ | {"FTCORE_FAULTS": "hang step=2"})
    _, err = run.communicate(timeout=120)
    assert run.returncode == 5 and "HardwareError: Nothing was done for 2 seconds (hang_timeout)" in err
    assert "faults.py" in err  # the stack


@pytest.mark.slow
@pytest.mark.processes
def test_a_process_of_two_that_is_stopped_for_good_ends_the_run_as_a_fault_of_the_machine(tmp_path):
    run = begun(tmp_path, *ENDLESS, "hang_timeout=10", "hardware=ddp_2cpu")
    trains(run, tmp_path)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    workers = [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[-1], signal.SIGSTOP)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 5, err
    assert "Nothing was done for 10 seconds" in err


def test_the_run_begun_last_is_the_newest_though_the_clock_was_set_back(ftcore, monkeypatch):
    for now in ("2026-03-01_12-00-00", "2026-02-01_12-00-00", "2026-01-01_12-00-00"):
        with monkeypatch.context() as patched:
            patched.setattr(run_folders.time, "strftime", lambda _, now=now: now)
            assert ftcore(*WORDS, "evaluate.enabled=false").status == 0
    (parent,) = {run.folder.parent for run in Run.below(ftcore("--version").cwd)}
    names = [run.name for run in Run.named(parent)]
    assert names == ["2026-03-01_12-00-00-3", "2026-03-01_12-00-00-2", "2026-03-01_12-00-00"]
    (parent / "2026-03-01_12-00-00-2").rename(parent / "2026-03-01_12-00-00-10")
    assert Run.named(parent)[0].name.endswith("-10")


def test_only_folders_that_a_run_writes_are_its_checkpoints(ftcore):
    words = [*WORDS, "max_steps=6", "checkpoints.every=1", "evaluate.enabled=false", "name=copies"]
    first = ftcore(*words, "max_steps=3")
    theirs = [first.folder / "checkpoints" / name for name in ("step-zz1", "step-00000002-good", "step-12")]
    for folder in theirs:
        folder.mkdir()
    (first.folder / "summary.json").unlink()
    assert ftcore(*words, "resume=auto").status == 0
    ours = [folder.name for folder in checkpoint.folders(first.folder / "checkpoints")]
    assert ours == ["step-00000005", "step-00000004"] and all(folder.is_dir() for folder in theirs)


def test_a_link_in_the_place_of_a_result_is_replaced_and_what_it_points_to_stays(ftcore, finished, tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text("mine")
    ftcore("eval", f"run={finished}", "evaluate.max_rows=2")
    (scores,) = (file for file in finished.glob("eval-*.json") if file.suffix == ".json")
    scores.unlink()
    scores.symlink_to(outside)
    assert ftcore("eval", f"run={finished}", "evaluate.max_rows=2").status == 0
    assert outside.read_text() == "mine" and not scores.is_symlink() and "tuned" in json.loads(scores.read_text())


def test_of_two_exports_at_once_one_waits(finished):
    both = [begun(finished, "export", f"run={finished}") for _ in range(2)]
    said = {process.returncode: text for process in both for text in [process.communicate(timeout=120)[1]]}
    assert sorted(said) == [0, 7] and "merged exists already" in said[7]


def test_a_pack_to_a_full_disk_leaves_nothing_and_can_be_tried_again(finished, ftcore, fails, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = ["pack", f"run={finished}", "output_dir=packed"]
    with monkeypatch.context() as patched:
        patched.setattr(pack.shutil, "copyfile", full)
        message = fails(7, *words)
    assert "No space left on device" in message and "(packed/recipe." in message
    outcome = ftcore(*words)
    assert outcome.status == 0, outcome.err
    assert {file.name for file in (outcome.cwd / "packed").iterdir()} == {"recipe.yaml", "recipe.lock.json"}


def test_a_full_disk_is_named_by_the_file_that_did_not_fit(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/table\.json'"),
        whole_file(tmp_path / "table.json"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_working_directory_that_is_gone_is_named(fails, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    monkeypatch.setenv("PWD", str(gone))
    gone.rmdir()
    assert f"working directory does not exist any more ({gone})" in fails(7, *WORDS)


@pytest.mark.parametrize("word", ["resume=~nobody/run", "eval run=~nobody/run", "--config-dir=~nobody"])
def test_a_tilde_before_a_name_that_nobody_has_is_a_part_of_the_path(fails, word):
    assert "~nobody" in fails(2, *word.split())
