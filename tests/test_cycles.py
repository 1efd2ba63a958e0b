"""Cycles of fine-tuning, each on the run before and on people's votes: what a summary says of them."""

import hashlib
import json
import shutil

import pytest

from ftcore.cli.command import run_command
from ftcore.data.feedback import Feedback
from ftcore.data.votes import as_lines
from ftcore.files import PACKAGE, write_lines
from ftcore.run_folder import Run
from tests.conftest import FAST, latest

MEDICAL = PACKAGE / "datasets/medical"
TINY = [*FAST, "hardware=cpu", "max_steps=2", "global_batch_size=4", "retention.weight=0", "evaluate.max_rows=2"]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def votes(count):
    """Votes on answers to training questions, the right one now on the left and now on the right."""
    for number, pair in enumerate(lines(MEDICAL / "preference.train.jsonl")[:count]):
        choice = ("left", "right")[number % 2]
        left, right = [pair["chosen"], pair["rejected"]][:: 1 if choice == "left" else -1]
        yield {
            "id": f"{number:04x}", "time": float(number), "rater": "ann", "purpose": "teach", "prompt": pair["prompt"],
            "left": left, "right": right, "authors": ["sft", "sft/base"], "choice": choice, "text": None, "note": None,
        }  # fmt: skip


def train(*words):
    """The folder of a new run."""
    before = {run.folder for run in Run.below(Run("runs").folder)}
    assert run_command(latest(*TINY, *words)) == 0
    (made,) = {run.folder for run in Run.below(Run("runs").folder)} - before
    return made.resolve()


@pytest.fixture(scope="module")
def cycles(tmp_path_factory):
    """Three runs, each on the one before: on shipped rows, and twice on votes."""
    folder = tmp_path_factory.mktemp("cycles")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for name, count in (("first", 12), ("second", 24)):
            write_lines(folder / f"{name}.jsonl", votes(count))
        shutil.copyfile(MEDICAL / "preference.test.jsonl", folder / "held_out.jsonl")
        made = [train("method=sft")]
        for name in ("first", "second"):
            rows = ["data=feedback", f"data.path={name}.jsonl", "data.splits.test=held_out.jsonl"]
            made.append(train("method=dpo", *rows, f"name={name} votes", f"model.path={made[-1]}"))
    return made


@pytest.fixture
def place(cycles):
    """The folder that they were made in."""
    return cycles[0].parents[2]


def test_a_summary_says_what_a_run_was_made_from(cycles, place):
    base, first, second = (Run(folder).summary for folder in cycles)
    assert base["parents"] == [] and "votes" not in base
    (parent,) = second["parents"]
    assert (parent["run"], parent["name"]) == (str(cycles[1]), "first votes")
    assert first["parents"][0]["name"] == "sft-medical-tiny"
    assert parent["weights"] != first["parents"][0]["weights"]
    file = place / "second.jsonl"
    assert second["votes"] == {"path": str(file), "sha256": sha256(file)}


def test_votes_of_a_store_are_hashed_as_their_export(tmp_path):
    store = Feedback(tmp_path)
    store.take_in(votes(3))
    write_lines(tmp_path / "export.jsonl", store.exported())
    assert as_lines(store.file) == (tmp_path / "export.jsonl").read_bytes()
    assert len(lines(tmp_path / "export.jsonl")) == 3
