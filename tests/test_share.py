"""A packed run gives the same scores elsewhere; what would make them others is told, before training where it can be."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftcore.config.compose import load_config
from ftcore.run_folder import Summary
from ftcore.sharing.lock import disagreements
from tests.conftest import FAST

TINY = [*FAST, "max_steps=2", "method.lr=1e-3", "seed=7"]
HEAD = "# @package _global_\n"


def answers(count=60, word="blue"):
    return [{"prompt": f"Which colour has number {k}?", "completion": f"{word} {k}"} for k in range(count)]


def lock_of(folder: Path) -> dict:
    return json.loads((folder / "recipe.lock.json").read_text())


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A packed run of shipped rows, made once: the folder with its recipe and lock."""
    folder = tmp_path_factory.mktemp("packed")
    for words in (TINY, ["pack", "run=" + "{run}"]):
        run = next(iter(folder.glob("runs/*/*")), "")
        command = [sys.executable, "-m", "ftcore", *(word.format(run=run) for word in words)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder / "sft-medical-tiny"


@pytest.fixture
def packed(shipped, tmp_path):
    """A copy of it that a test may change."""
    folder = tmp_path / "received"
    folder.mkdir()
    for file in shipped.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_replay_elsewhere_gives_the_scores_of_the_lock_to_the_digit(packed, tmp_path, monkeypatch, ftcore):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path / "home"))
    outcome = ftcore("replay", f"recipe={packed / 'recipe.yaml'}", "expect=true")
    assert outcome.status == 0, outcome.err
    assert "Nothing differs from the lock" in outcome.out and "The scores are those of the lock." in outcome.out
    expected = lock_of(packed)["expected"]
    assert (outcome.summary["base"], outcome.summary["tuned"]) == (expected["base"], expected["tuned"])


def test_other_scores_are_told_in_a_table_and_by_the_exit_code(packed, ftcore):
    lock = lock_of(packed)
    expected = lock["expected"]["tuned"]["loss"]
    lock["expected"]["tuned"]["loss"] = expected * 1.001
    lock["versions"]["torch"] = "1.0"
    (packed / "recipe.lock.json").write_text(json.dumps(lock))
    words = ["replay", f"recipe={packed / 'recipe.yaml'}", "expect=true"]
    outcome = ftcore(*words)
    assert outcome.status == 1
    assert "OtherScores: 1 scores are not those of the lock" in outcome.err
    assert "versions.torch" in outcome.out and "1.0" in outcome.out
    assert "tuned.loss" in outcome.out and str(expected) in outcome.out
    assert ftcore(*words, "tolerance=0.01").status == 0
    assert ftcore(*words[:2]).status == 0  # nothing is expected


def test_rows_that_are_others_are_refused_before_training(ftcore, rows, tmp_path):
    own = rows(*answers(), name="ours.jsonl")
    run = ftcore(*TINY, "data=jsonl", f"data.path={own}")
    assert ftcore("pack", f"run={run.folder}", "output_dir=packed").status == 0
    words = ["replay", f"recipe={tmp_path / 'packed/recipe.yaml'}", "expect=true", "output_dir=again"]
    changed = rows(*answers(59), {"prompt": "Which colour has number 59?", "completion": "red"}, name="changed.jsonl")
    refused = ftcore(*words, f"data.path={changed}")
    assert refused.status == 3 and "rows.train.sha256" in refused.err
    assert not (tmp_path / "again").exists()
    renamed = rows(*answers(), name="renamed.jsonl")  # other name, same rows
    assert ftcore(*words, f"data.path={renamed}").status == 0


def test_own_rows_travel_by_name_and_hash_only(ftcore, rows, tmp_path):
    own = rows(*answers(word="confidential"), name="ours.jsonl")
    run = ftcore(*TINY, "data=jsonl", f"data.path={own}", "data.too_long=truncate", "private=true")
    assert ftcore("pack", f"run={run.folder}", "output_dir=packed").status == 0
    recipe = (tmp_path / "packed/recipe.yaml").read_text()
    text = recipe + (tmp_path / "packed/recipe.lock.json").read_text()
    assert str(tmp_path) not in text and str(Path.home()) not in text
    assert "confidential" not in text and "colour" not in text
    assert re.search(r'# Own: ours.jsonl, SHA-256 [0-9a-f]{64}: give data.path=<path>.\n  path: "\?\?\?"', recipe)
    told = ftcore("replay", f"recipe={tmp_path / 'packed/recipe.yaml'}")
    assert told.status == 2 and "give data.path=... on the command line" in told.err


def test_a_packed_recipe_is_one_of_the_strict_kind_and_composes_to_the_same_config(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("FTCORE_RECIPES", str(packed))
    now, before = load_config(["recipes=recipe"]), load_config([*TINY, "hardware.precision=32-true"])
    assert {k: v for k, v in now.items() if k != "choices"} == {k: v for k, v in before.items() if k != "choices"}
    text = (packed / "recipe.yaml").read_text()
    assert text.startswith(HEAD + "# For: ") and "\n# Needs: " in text and "\n# Gave: loss " in text
    assert "weight_decay" not in text and "global_batch_size" not in text  # only differences


def test_values_that_yaml_reads_in_two_ways_stay_what_they_are(ftcore, rows, tmp_path):
    columns = 'data.columns={prompt: "{prompt} 1e3: # no", completion: completion}'
    run = ftcore(*TINY, "data=jsonl", f"data.path={rows(*answers())}", columns, "name='1e3'", "method.lr=1e-05")
    assert run.status == 0, run.err
    assert ftcore("pack", f"run={run.folder}", "output_dir=packed").status == 0
    again = load_config([f"data.path={tmp_path}/rows.jsonl"], (), tmp_path / "packed/recipe.yaml")
    assert again["data"]["columns"]["prompt"] == "{prompt} 1e3: # no"
    assert again["name"] == "1e3" and again["method"]["lr"] == 1e-05


def reward_models(folder: Path) -> list[Path]:
    return list(folder.glob("home/stages/reward-*[!k]"))


def test_stages_are_packed_as_overrides_and_a_run_in_place_of_one_is_refused(ftcore, tmp_path, monkeypatch):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path / "home"))
    stages = "method.stages={policy: ['method=sft', 'max_steps=1'], reward_model: ['method=reward', 'max_steps=1']}"
    few = ["method.group_size=1", "global_batch_size=4", "max_steps=1", "method.max_new_tokens=4"]
    run = ftcore(*FAST, "method=rlhf", stages, *few)
    assert run.status == 0, run.err
    assert ftcore("pack", f"run={run.folder}", "output_dir=packed").status == 0
    text = (tmp_path / "packed/recipe.yaml").read_text()
    assert "policy: [" in text and "max_steps=1" in text and str(tmp_path) not in text
    assert "policy: null" not in text  # as in conf/
    second = ftcore(*TINY, f"model.path={run.folder}", "name=second")
    assert (
        ftcore("pack", f"run={second.folder}", "output_dir=both").status == 0
    )  # a cycle whose stages are packed as ever
    assert "policy: [" in (tmp_path / "both/1-rlhf-medical-tiny/recipe.yaml").read_text()
    given = [f"method.policy={second.folder}", *(f"method.reward_model={path}" for path in reward_models(tmp_path))]
    third = ftcore(*FAST, "method=rlhf", *few, *given, "name=third")
    refused = ftcore("pack", f"run={third.folder}", "output_dir=other")
    assert refused.status == 2 and "export run=" in refused.err and not (tmp_path / "other").exists()


def test_secrets_are_not_packed(shipped, fails, ftcore, tmp_path, monkeypatch):
    token = "hf_" + "a1B2c3D4" * 4
    run = next(shipped.parent.glob("runs/*/*"))
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    assert ftcore("pack", f"run={copy}", "output_dir=clean").status == 0
    assert not any("0123456789abcdef" in file.read_text() for file in (tmp_path / "clean").iterdir())
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("name: sft-medical-tiny", f"name: {token}"))
    message = fails(2, "pack", f"run={copy}", "output_dir=dirty")
    assert "looks like a secret" in message and token not in message and not (tmp_path / "dirty").exists()


def test_a_run_that_is_not_finished_or_is_changed_is_not_packed(shipped, fails, tmp_path):
    run = next(shipped.parent.glob("runs/*/*"))
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    assert "has no summary.json" in fails(2, "pack", f"run={tmp_path}")
    assert "leave seed out" in fails(2, "pack", f"run={run}", "seed=8")
    assert "needs run=" in fails(2, "pack")
    assert "exists already" in fails(7, "pack", f"run={run}", f"output_dir={shipped}")


def test_check_says_everything_at_once_with_its_line_quickly_and_without_torch(tmp_path):
    text = HEAD + (
        "defaults:\n  - override /data: jsonl\n  - override /adapter: loraa\nmethod:\n  lrr: 1\n  lr: -1\nseed: many\n"
        "data:\n  splits:\n    test: nowhere.jsonl\nmodel:\n  path: /no/weights\n"
    )
    (tmp_path / "any name.yaml").write_text(text)
    code = "import sys; from ftcore.__main__ import run_command as run; print(run(sys.argv[1:])); print('torch' in sys.modules)"
    started = time.monotonic()
    command = [sys.executable, "-c", code, "check", "recipe=any name.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert time.monotonic() - started < 5
    assert done.stdout.split() == ["2", "False"]
    for line, said in (
        (4, "'loraa'; did you mean 'lora'?"), (6, "method.lrr is not a key; did you mean 'lr'?"), (7, "method.lr must be"),
        (8, "seed must be a whole number"), (11, "data.splits.test cannot be read"), (13, "model.path names no folder"),
    ):  # fmt: skip
        assert re.search(rf"{re.escape(said)}.*\(any name.yaml:{line}\)", done.stderr), (said, done.stderr)
    assert "data.path is missing: give data.path=..." in done.stderr
    assert "7 problems" in done.stderr


def test_what_a_recipe_leaves_open_is_asked_for_even_where_conf_has_a_value(tmp_path, fails, ftcore):
    text = HEAD + "defaults:\n  - override /model: tiny\nmodel:\n  path: '???'\nretention:\n  text: ???\n"
    (tmp_path / "open.yaml").write_text(text)
    said = fails(2, "check", f"recipe={tmp_path / 'open.yaml'}", "retention.text=ftcore://general/passages.train.jsonl")
    assert "model.path is missing" in said and "open.yaml:5" in said and "retention" not in said
    given = ["retention.text=ftcore://general/passages.train.jsonl", f"model.path={tmp_path}"]
    assert ftcore("check", f"recipe={tmp_path / 'open.yaml'}", *given).status == 0


def test_check_says_what_a_right_recipe_would_train(packed, ftcore, fails):
    outcome = ftcore("check", f"recipe={packed / 'recipe.yaml'}", "method.lr=2e-3")
    assert outcome.status == 0
    for part in ("method=sft", "data=medical", "adapter=lora", "2 steps", "seed 7"):
        assert part in outcome.out
    wrong = fails(2, "check", f"recipe={packed / 'recipe.yaml'}", "method.beta=1", "data=medmcqa", "model.path=./none")
    assert "method.beta is not a key" in wrong and "model.path names no folder" in wrong
    assert "Nothing is wrong with recipes=medical_sft." in ftcore("check", "recipes=medical_sft").out
    assert "There is no recipe file" in fails(2, "check", "recipe=nowhere.yaml")
    assert "Which recipe?" in fails(2, "replay")
    (packed / "bad.yaml").write_text(HEAD + "trust: [os]\n")
    assert "bad.yaml:2" in fails(2, "check", f"recipe={packed / 'bad.yaml'}")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1}', "[" * 100_000, '{"format": 1, "versions": {"torch": "\\u001b[2J"}}']
)
def test_a_lock_that_is_none_is_refused(packed, fails, content):
    (packed / "recipe.lock.json").write_text(content)
    assert "is not a lock" in fails(2, "replay", f"recipe={packed / 'recipe.yaml'}")


def test_a_lock_with_control_characters_is_refused(packed, fails):
    lock = lock_of(packed)
    lock["versions"]["torch"] = "\u001b[2J"
    (packed / "recipe.lock.json").write_text(json.dumps(lock))
    assert "is not a lock" in fails(2, "replay", f"recipe={packed / 'recipe.yaml'}")


@pytest.mark.parametrize(
    ("key", "seen", "agree"),
    [("loss", 2.0 * (1 + 9e-7), True), ("loss", 2.0 * (1 + 2e-6), False), ("accuracy", 0.5, True),
     ("accuracy", 0.6, False), ("loss", None, False), ("probe", None, True)],
)  # fmt: skip
def test_scores_agree_within_the_tolerance(key, seen, agree):
    base = {"loss": 2.0, "accuracy": 0.5, "probe": None, "rows_with_checkable_answer": 10}
    lock = {"expected": {"base": base, "tuned": base}, "tolerance": {"relative": 1e-6, "rows": 0}}
    assert bool(disagreements(lock, Summary({"base": base, "tuned": {**base, key: seen}}))) is not agree
    lock["tolerance"]["rows"] = 1
    assert not disagreements(lock, Summary({"base": base, "tuned": {**base, "accuracy": 0.6}}))
    assert disagreements(lock, Summary({"base": base, "tuned": {**base, "accuracy": 0.7}}))
