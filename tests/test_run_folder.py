"""A run knows the weights that it was made from, and what is written in its folder."""

import json
import shutil

import pytest

from ftcore.run_folder import Run
from tests.conftest import FAST

WORDS = [*FAST, "hardware=cpu", "max_steps=1"]


@pytest.fixture
def swapped(ftcore, tmp_path):
    """A finished LoRA run on a folder of weights, which then get others of the same shapes."""
    weights = [ftcore(*WORDS, "adapter=full", f"seed={seed}", f"name=base{seed}").folder for seed in (1, 2)]
    shutil.copytree(weights[0] / "model", tmp_path / "base")
    outcome = ftcore(*WORDS, f"model.path={tmp_path / 'base'}", "model.random_weights=false", "name=tuned")
    assert outcome.status == 0, outcome.err
    assert ftcore("eval", f"run={outcome.folder}").status == 0
    shutil.copy(weights[1] / "model" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    return outcome.folder


@pytest.mark.parametrize("verb", ["eval", "compare", "chat", "export", "pack"])
def test_base_weights_that_were_swapped_are_refused(fails, swapped, verb):
    words = ["prompt=Hello"] if verb == "chat" else []
    message = fails(4, verb, f"run={swapped}", *words)
    assert "other base weights" in message and "model.safetensors" in message


def test_weights_whose_config_says_another_model_are_refused(ftcore, fails, tmp_path):
    folder = ftcore(*WORDS, "adapter=full", "name=base").folder / "model"
    tuned = ftcore(*WORDS, f"model.path={folder}", "model.random_weights=false", "name=tuned").folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9"}))
    assert ftcore("eval", f"run={tuned}").status == 0
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    message = fails(4, "eval", f"run={tuned}")
    assert "other base weights" in message and "config.json" in message


def test_swapped_base_weights_are_refused_as_foundation_and_on_resume(fails, swapped):
    assert "other base weights" in fails(4, *WORDS, f"model.path={swapped}")
    (swapped / "summary.json").unlink()
    assert "other base weights" in fails(4, f"resume={swapped}", "hardware=cpu")


def test_a_run_says_what_it_was_made_from_and_what_it_gave(ftcore):
    first = ftcore(*WORDS)
    second = ftcore(*WORDS, f"model.path={first.folder}", "model.random_weights=false", "name=second")
    run = Run(second.folder)
    assert run.finished and run.summary and run.summary.score("tuned.loss") == second.summary["tuned"]["loss"]
    assert [parent.folder for parent in run.parents] == [first.folder]
    assert [row["step"] for row in run.metrics()] == [1] and len(run.samples()) == 4
    assert json.loads((run.folder / "weights.json").read_text()).keys() == {"adapter_model.safetensors"}
    assert [found.folder for found in Run.below(first.cwd)] == sorted([first.folder, second.folder])
