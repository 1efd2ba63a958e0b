"""Many runs from one command: what fails touches no other, the same command goes on, and the answer is honest about chance."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
import yaml
from filelock import FileLock

from ftcore.config.options import options
from ftcore.run_folder import Run
from ftcore.sweeps.job import Job
from ftcore.sweeps.pool import Pool
from ftcore.sweeps.report import finish
from ftcore.sweeps.sweep import read_sweep
from ftcore.train.faults import VARIABLE
from ftcore.ui.report import of_sweep
from tests.conftest import FAST

TINY = [*FAST, "max_steps=2"]
HEADER = "# @package _global_\ndefaults:\n  - override /model: tiny\n"


def answer(outcome):
    return json.loads(next(outcome.cwd.glob("runs/*/sweep-*/sweep.json")).read_text())


@pytest.fixture
def team(tmp_path, monkeypatch):
    """Write a sweep file of a team; `sweeps=own` finds it."""
    monkeypatch.setenv("FTCORE_RECIPES", str(tmp_path / "team"))
    (tmp_path / "team").mkdir()

    def write(text):
        (tmp_path / "team" / "own.yaml").write_text(HEADER + text)

    return write


def test_jobs_that_fail_touch_no_other_and_the_same_command_runs_only_those(ftcore, monkeypatch):
    monkeypatch.setenv(VARIABLE, "raise step=1 seed=2; kill step=1 seed=3")
    command = ["-m", "seed=1,2,3,4", "sweep.n_jobs=2", *TINY]
    outcome = ftcore(*command)
    assert outcome.status == 1
    assert "2 of 4 jobs failed" in outcome.err
    reasons = {job["changes"]["seed"]: job["state"] for job in answer(outcome)["jobs"]}
    assert reasons["1"] == reasons["4"] == "done"
    assert "a fault that was asked for" in reasons["2"]
    assert reasons["3"] == "killed by SIGKILL"
    monkeypatch.delenv(VARIABLE)
    before = {path: path.stat().st_mtime_ns for path in outcome.cwd.glob("runs/*/sweep-*/*/*/summary.json")}
    again = ftcore(*command)
    assert again.status == 0
    assert len(before) == 2
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert len(list(outcome.cwd.glob("runs/*/sweep-*/*/*/summary.json"))) == 4
    page = (next(outcome.cwd.glob("runs/*/sweep-*")) / "report.html").read_text()
    assert "<svg" in page and len(page) < 300_000


def test_a_job_gives_what_the_same_command_gives_alone(ftcore):
    swept = ftcore("-m", "seed=5,6", *TINY)
    alone = ftcore("seed=6", "output_dir=alone", *TINY)
    scores = {job["changes"]["seed"]: job["summary"]["tuned"] for job in answer(swept)["jobs"]}
    summary = json.loads(next(alone.cwd.glob("alone/*/*/summary.json")).read_text())
    assert scores["6"]["loss"] == pytest.approx(summary["tuned"]["loss"], rel=1e-6)
    assert scores["5"]["loss"] != pytest.approx(summary["tuned"]["loss"], rel=1e-6)


def print_imported(names):
    print(*(name for name in names if name in sys.modules))
    return 0


def test_a_job_begins_with_everything_imported(tmp_path):
    """The server of the jobs passes over an ImportError of what it preloads: jobs would only begin later."""
    names = ["ftcore.train.run", "ftcore.runs.preload"]  # the second is there only if it was imported to its end
    job = Job(0, names, {}, tmp_path / "job")
    with closing(Pool(print_imported, size=1)) as pool:
        pool.start(job)
        assert pool.wait(60)
    assert job.log.read_text().split() == names


@pytest.mark.slow
def test_tpe_goes_on_with_its_study(ftcore, team):
    team("search:\n  method.lr: {low: 1.0e-4, high: 1.0e-1, log: true}\n  adapter.rank: [4, 8]\nsampler: tpe\n")
    assert ftcore("sweeps=own", "sweep.trials=2", *TINY).status == 0
    outcome = ftcore("sweeps=own", "sweep.trials=3", *TINY)
    jobs = answer(outcome)["jobs"]
    assert [job["state"] for job in jobs] == ["done"] * 3
    assert all(1e-4 <= float(job["changes"]["method.lr"]) <= 1e-1 for job in jobs)
    assert len({job["changes"]["method.lr"] for job in jobs}) == 3


def test_tpe_repeats_what_failed_in_its_own_folder(ftcore, team, monkeypatch):
    team("search:\n  method.lr: {low: 1.0e-4, high: 1.0e-1, log: true}\nsampler: tpe\nsweep:\n  trials: 2\n")
    monkeypatch.setenv(VARIABLE, "raise step=1")
    assert ftcore("sweeps=own", *TINY).status == 1
    monkeypatch.delenv(VARIABLE)
    outcome = ftcore("sweeps=own", *TINY)
    assert outcome.status == 0
    assert [job["state"] for job in answer(outcome)["jobs"]] == ["done", "done"]


@pytest.mark.parametrize(
    ("text", "words", "part"),
    [
        ("search:\n  method.lrr: [1, 2]\n", [], "method.lrr is not a key; did you mean 'lr'?"),
        ("search:\n  method.lr: [1.0e-3, none]\n", [], "method.lr must be"),
        ("search:\n  method.lr: {low: 1.0e-4, high: 1.0e-2}\n", [], "needs a list of values"),
        ("search:\n  method.lr: {low: 1.0e-2, high: 1.0e-4}\nsampler: tpe\n", [], "search.method.lr"),
        ("search:\n  method.lr: {lo: 1.0e-4, high: 1.0e-2}\nsampler: tpe\n", [], "low and high"),
        ("search:\n  output_dir: [/tmp, /var]\n", [], "search.output_dir is not a key"),
        ("search:\n  trust: [[os]]\n", [], "search.trust is not a key"),
        ("search:\n  method._target_: [os.system]\n", [], "_target_"),
        ("seed: 1\n", [], "Nothing is swept"),
        ("search:\n  seed: []\n", [], "needs a list of values"),
        ("search:\n  seed: [1, 2]\n", ["seed=3"], "seed has a value here, and the sweep's file searches it"),
    ],
)
def test_a_wrong_sweep_file_runs_nothing(fails, team, tmp_path, text, words, part):
    team(text)
    assert part in fails(2, "sweeps=own", *words, *TINY)
    assert not list(tmp_path.glob("runs/**/config.yaml"))


@pytest.mark.parametrize("words", [["-m", "seed=1"], ["-m", "method.lr=interval(1e-4,1e-2)"], ["seed=1,2"]])
def test_a_wrong_sweep_command_runs_nothing(fails, tmp_path, words):
    fails(2, *words, *TINY)
    assert not list(tmp_path.glob("runs/**/config.yaml"))


def test_two_commands_do_not_share_a_folder(ftcore, fails, team, tmp_path):
    team("search:\n  seed: [1, 2]\n")
    assert ftcore("wandb_sweep", "sweeps=own", "model=tiny", "dry_run=true").status == 0
    folder = next(tmp_path.glob("runs/*/sweep-*"))
    with FileLock(folder / ".lock"):
        assert "Another command is running this sweep" in fails(2, "sweeps=own", "model=tiny")


def test_wandb_gets_the_same_sweep(ftcore, team, tmp_path):
    team("search:\n  method.lr: {low: 1.0e-4, high: 1.0e-1, log: true}\n  adapter.rank: {low: 4, high: 16, step: 4}\n"
         "  method.packing: [true, false]\nsampler: tpe\n")  # fmt: skip
    outcome = ftcore("wandb_sweep", "sweeps=own", "max_steps=2", "dry_run=true")
    assert "wandb sweep --project ftcore" in outcome.out
    settings = yaml.safe_load(next(tmp_path.glob("runs/*/sweep-*/wandb-sweep.yaml")).read_text())
    assert settings["parameters"] == {
        "method.lr": {"min": 1e-4, "max": 1e-1, "distribution": "log_uniform_values"},
        "adapter.rank": {"min": 4, "max": 16, "distribution": "q_uniform", "q": 4},
        "method.packing": {"values": [True, False]},
    }
    assert settings["metric"] == {"name": "tuned.loss", "goal": "minimize"}
    assert settings["command"][2:] == ["-m", "ftcore", "sweeps=own", "max_steps=2", "${args_no_hyphens}"]


def test_an_agent_of_wandb_runs_one_job_of_a_sweep_file(ftcore, team, monkeypatch):
    team("search:\n  seed: [1, 2]\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    outcome = ftcore("sweeps=own", *TINY, "seed=2")
    assert outcome.status == 0
    assert not list(outcome.cwd.glob("runs/*/sweep-*"))
    assert outcome.summary["steps"] == 2


@pytest.mark.parametrize("name", options("sweeps"))
def test_a_shipped_sweep_searches_what_can_be_searched(name):
    _, searched, config = read_sweep([f"sweeps={name}"], ())
    assert searched == config["search"]
    assert config["choices"]["sweeps"] == name


def finished(folder, seed, rank, right, rows="rows"):
    """A job as it looks when it is done: 40 questions, those of `right` answered rightly."""
    job = Job(seed * 100 + rank, [], {"adapter.rank": str(rank), "seed": str(seed)}, folder / f"{seed}-{rank}")
    run = Run(job.folder / "then")
    run.folder.mkdir(parents=True)
    run.config_file.touch()
    sums, counts = [[float(k in right) for k in range(40)]], [[1.0] * 40]
    by_row = {"accuracy": {"rows": rows, "sums": sums, "counts": counts, "exponential": False}}
    run.finish({"base": {}, "tuned": {"accuracy": len(right) / 40}}, [], by_row)
    return job


def verdict_of(folder, jobs, objective="tuned.accuracy", direction="maximize"):
    finish({"sweep": {"objective": objective, "direction": direction}, "logger": None}, folder, jobs, ())
    return json.loads((folder / "sweep.json").read_text())["verdict"]


@pytest.mark.parametrize("seeds", [[1], [1, 2]])
@pytest.mark.parametrize(("second", "said"), [(range(38), "not decided"), (range(8), "better than the next")])
def test_a_sweep_says_whether_its_best_is_better_than_the_next(tmp_path, seeds, second, said):
    jobs = [finished(tmp_path, seed, rank, right) for seed in seeds for rank, right in ((4, second), (8, range(39)))]
    verdict = verdict_of(tmp_path, jobs)
    assert verdict.startswith("Best by tuned.accuracy: adapter.rank=8") and "over 40 held-out rows" in verdict
    assert ("(95 %), " + said) in verdict and ("would decide" in verdict) == (said == "not decided")


@pytest.mark.parametrize(("seeds", "said"), [(1, "sweep over seeds"), (3, "over 3 seeds"), (6, "over 6 seeds")])
def test_settings_on_different_rows_are_compared_over_seeds(tmp_path, seeds, said):
    both = ((4, range(8), "some"), (8, range(39), "others"))
    jobs = [finished(tmp_path, seed, rank, right, rows) for seed in range(seeds) for rank, right, rows in both]
    verdict = verdict_of(tmp_path, jobs)
    assert said in verdict and ("better than the next" in verdict) == (seeds == 6)  # as few as three decide nothing


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_direction_of_a_sweep_says_which_way_is_better(tmp_path, direction):
    jobs = [finished(tmp_path, 1, rank, right) for rank, right in ((4, range(8)), (8, range(39)))]
    verdict = verdict_of(tmp_path, jobs, direction=direction)
    best = {"minimize": 4, "maximize": 8}[direction]
    assert f"Best by tuned.accuracy: adapter.rank={best} " in verdict and "better than the next" in verdict


@pytest.mark.parametrize(("key", "ranked"), [("method", False), ("data", False), ("method.lr", True)])
def test_losses_of_one_method_or_data_set_are_not_ranked_against_another_s(tmp_path, key, ranked):
    jobs = [finished(tmp_path, 1, rank, ()) for rank in (1, 2)]
    for job, word in zip(jobs, ("a", "b"), strict=True):
        job.changes = {key: word}
        (job.runs[0].folder / "summary.json").write_text(json.dumps({"tuned": {"loss": job.number}}))
    verdict = verdict_of(tmp_path, jobs, "tuned.loss", "minimize")
    assert ("Best by" in verdict) == ranked != ("sweep.objective=tuned.accuracy" in verdict)


def test_values_of_a_sweep_are_shown_as_they_are(tmp_path, capfd):
    words = ["[contains_answer]", "[/x]", "<a href='https://x'>y</a>"]
    jobs = [finished(tmp_path, 1, rank, ()) for rank in range(len(words))]
    for job, word in zip(jobs, words, strict=True):
        job.changes = {"method.rewards": word}
    finish({"sweep": {"objective": "tuned.accuracy", "direction": "maximize"}, "logger": None}, tmp_path, jobs, ())
    shown = capfd.readouterr().out
    assert all(word in shown for word in words), shown
    page = of_sweep(tmp_path).read_text()
    assert "&lt;a href=" in page and "<a href='" not in page


@pytest.mark.slow
@pytest.mark.processes
def test_methods_data_and_processes_are_swept_together(ftcore):
    """The 2 x 2 x 2 of two methods, two data options and one or two processes."""
    words = ["method=sft,dpo", "data=medical,icd10", "hardware=cpu,ddp_2cpu", "model=tiny", "max_steps=2"]
    outcome = ftcore("-m", *words)
    assert outcome.status == 0, outcome.out
    assert [job["state"] for job in answer(outcome)["jobs"]] == ["done"] * 8


@pytest.mark.slow
def test_three_of_twenty_jobs_fail_and_only_those_run_again(ftcore, monkeypatch):
    monkeypatch.setenv(VARIABLE, "raise step=2 seed=3; kill step=2 seed=9; hang step=2 seed=15")
    command = ["-m", "seed=range(20)", "sweep.n_jobs=2", "sweep.time_limit=60", *TINY]
    outcome = ftcore(*command)
    assert outcome.status == 1
    failed = {job["changes"]["seed"]: job["state"] for job in answer(outcome)["jobs"] if job["state"] != "done"}
    assert set(failed) == {"3", "9", "15"}
    assert failed["15"] == "longer than 60 s"
    monkeypatch.delenv(VARIABLE)
    logs = {path: path.stat().st_mtime_ns for path in outcome.cwd.glob("runs/*/sweep-*/*/output.log")}
    assert ftcore(*command).status == 0
    assert sum(path.stat().st_mtime_ns != then for path, then in logs.items()) == 3


@pytest.mark.slow
def test_a_launcher_of_hydra_runs_the_jobs_by_name(ftcore):
    outcome = ftcore("-m", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *TINY)
    assert outcome.status == 0, outcome.err
    assert [job["state"] for job in answer(outcome)["jobs"]] == ["done", "done"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill", "number", "status"),
    [(os.killpg, signal.SIGINT, 130), (os.killpg, signal.SIGTERM, 143), (os.kill, signal.SIGTERM, 143)],
)
def test_ctrl_c_and_sigterm_end_every_job(tmp_path, kill, number, status):
    command = [sys.executable, "-m", "ftcore", "-m", "seed=1,2", "max_epochs=null", "max_steps=4321", *FAST]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True)
        until = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/sweep-*/*/*/metrics.jsonl")) and time.monotonic() < until:
            time.sleep(0.2)
        kill(process.pid, number)
        assert process.wait(30) == status
    found = subprocess.run(["pgrep", "-f", "max_steps=4321"], capture_output=True, text=True).stdout.split()
    assert not found
    assert list(tmp_path.glob("runs/*/sweep-*/*/*/checkpoints/*"))


def test_sigterm_lets_jobs_save_and_the_same_command_goes_on(ftcore, tmp_path):
    """In this process, so that a job begins in a second."""
    words = ["-m", "seed=1,2", "sweep.n_jobs=2", "global_batch_size=4", "max_steps=12", *FAST]
    before, children = signal.getsignal(signal.SIGTERM), multiprocessing.active_children()

    def terminate():
        until = time.monotonic() + 60
        while not list(tmp_path.glob("runs/*/sweep-*/*/*/metrics.jsonl")) and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    outcome = ftcore(*words)
    assert outcome.status == 143 and "the same command again goes on" in outcome.err
    assert signal.getsignal(signal.SIGTERM) == before and set(multiprocessing.active_children()) <= set(children)
    assert list(tmp_path.glob("runs/*/sweep-*/*/*/checkpoints/step-*"))
    again = ftcore(*words)
    assert again.status == 0, again.err
    assert [job["state"] for job in answer(again)["jobs"]] == ["done", "done"]
    assert len(list(tmp_path.glob("runs/*/sweep-*/*/*/config.yaml"))) == 2


@pytest.mark.parametrize("words", [["-m", "inspect"], ["inspect", "-m"]])
def test_inspect_is_swept_and_its_table_has_numbers(ftcore, rows, words):
    """A job that fails says why, the others are done, and the same command tries that one again."""
    good = rows(*({"prompt": f"What is {k}?", "completion": f"{k}."} for k in range(1100)), name="good.jsonl")
    command = [*words, "data=jsonl", f"data.path={good},gone.jsonl", "data.test_share=0", "model=tiny", "logger=none"]
    outcome = ftcore(*command)
    assert outcome.status == 1 and "1 of 2 jobs failed" in outcome.err, outcome.err
    assert all(title in outcome.out for title in ("rows.train", "rows.test", "tokens.median", "trained_share"))
    (line,) = [line for line in outcome.out.splitlines() if " done " in line]
    assert "1,100" in line
    done, failed = answer(outcome)["jobs"]
    assert done["state"] == "done" and done["summary"]["rows"] == {"train": 1100, "validation": 0, "test": 0}
    assert "gone.jsonl" in failed["state"] and failed["state"].startswith("DataError: ") and not failed["summary"]
    kept = json.loads(next(outcome.cwd.glob("runs/*/sweep-*/*/answer.json")).read_text())
    assert done["summary"] == {key: value for key, value in kept.items() if key not in ("samples", "hardest")}
    assert kept["tokens"]["longest"] >= kept["tokens"]["median"] > 0
    rows({"prompt": "What is it?", "completion": "It."}, name="gone.jsonl")
    again = ftcore(*command)
    assert again.status == 0, again.err
    assert [job["state"] for job in answer(again)["jobs"]] == ["done", "done"]


def test_eval_is_swept_over_runs(ftcore):
    runs = [ftcore(*TINY, f"seed={seed}", f"name=run{seed}").folder for seed in (1, 2)]
    outcome = ftcore("eval", "-m", f"run={runs[0]},{runs[1]}", "evaluate.max_rows=2")
    assert outcome.status == 0, outcome.err
    jobs = answer(outcome)["jobs"]
    assert [job["summary"]["run"] for job in jobs] == [str(run) for run in runs]
    assert f"{jobs[0]['summary']['tuned']['loss']:.3g}" in outcome.out


@pytest.mark.parametrize("verb", ["chat", "export", "pack", "storage"])
def test_a_verb_without_a_row_is_not_swept(fails, verb):
    assert f"{verb} takes one combination at a time" in fails(2, "-m", verb, "seed=1,2")


def test_paths_with_commas_brackets_and_spaces_are_swept(ftcore, rows):
    """Quotes of their own hold a comma together; the folder of the sweep is called like that too."""
    for name in ("a (1), [x].jsonl", "it's.jsonl"):
        rows(*({"prompt": f"What is {k}?", "completion": f"{k}."} for k in range(20)), name=name)
    words = [
        'data.path="a (1), [x].jsonl",it\'s.jsonl',
        "data=jsonl",
        "output_dir=my runs (2)",
        "model=tiny",
        "logger=none",
    ]
    outcome = ftcore("-m", "inspect", *words)
    assert outcome.status == 0, outcome.err
    (file,) = outcome.cwd.glob("my runs (2)/*/sweep-*/sweep.json")
    assert [job["summary"]["rows"]["train"] > 0 for job in json.loads(file.read_text())["jobs"]] == [True, True]
