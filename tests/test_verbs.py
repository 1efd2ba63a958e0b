"""`json=true`: standard output is one JSON document and nothing else, so that a program can read it."""

import json
from typing import Any

import pytest

from tests.conftest import FAST, Outcome


def document(outcome: Outcome) -> Any:
    """The only document on standard output; what people read is on standard error."""
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("\n") == 1
    return json.loads(outcome.out, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


@pytest.fixture
def run(ftcore):
    """The folder of a finished run."""
    return ftcore(*FAST, "max_steps=1").folder


def test_eval(ftcore, run):
    outcome = ftcore("eval", f"run={run}", "json=true")
    answer = document(outcome)
    assert answer["run"] == str(run) and answer["rows"] == 4
    assert answer["tuned"]["loss"] > 0 and answer["base"]["loss"] > 0
    assert answer["intervals"].keys() == {"loss", "perplexity", "accuracy"}
    assert "answer accuracy" in outcome.err and "not decided" in outcome.err


def test_compare(ftcore, run):
    answer = document(ftcore("compare", f"run={run}", "json=true"))
    assert answer["names"] == ["base", run.name]
    assert answer["first"]["loss"] > 0 and answer["second"]["loss"] > 0
    low, high = (answer["intervals"]["loss"][side] for side in ("low", "high"))
    assert low <= answer["second"]["loss"] - answer["first"]["loss"] <= high


def test_two_runs_are_compared_over_their_common_rows(ftcore):
    runs = [ftcore(*FAST, "evaluate.max_rows=8", "max_steps=4", f"method.lr={lr}").folder for lr in (0.01, 1e-9)]
    words = ["evaluate.max_rows=8", "evaluate.max_new_tokens=4", "evaluate.probe=null", "json=true"]
    for (run, other), verdict in {tuple(runs): "better", tuple(reversed(runs)): "worse"}.items():
        answer = document(ftcore("compare", f"run={run}", f"other={other}", *words))
        assert answer["intervals"]["loss"]["verdict"] == verdict
        assert answer["intervals"]["accuracy"]["verdict"] == "not decided"


def test_inspect(ftcore):
    answer = document(ftcore("inspect", "model=tiny", "json=true"))
    assert answer["type"] == "prompt_completion" and answer["rows"]["train"] == 504
    assert 0 < answer["tokens"]["median"] <= answer["tokens"]["longest"] and 0 < answer["trained_share"] < 1


def test_check(ftcore):
    answer = document(ftcore("check", "json=true", "model=tiny", "seed=3"))
    assert answer["recipe"] is None and answer["config"]["seed"] == 3


def test_explain(ftcore):
    outcome = ftcore("explain", "key=[seed,method]", "json=true", "model=tiny", "seed=3")
    seed, method = document(outcome)
    assert (seed["key"], seed["value"], seed["set_by"]) == ("seed", 3, "command line, seed=3")
    assert seed["replaced"][0]["value"] == 0 and method["value"]["lr"] > 0


def test_storage(ftcore, run):
    listed = document(ftcore("storage", "json=true"))
    assert {"kind": "runs", "path": str(run)}.items() <= next(one for one in listed if one["kind"] == "runs").items()
    deleted = document(ftcore("storage", "json=true", "delete=checkpoints", "yes=true"))
    assert [one["path"] for one in deleted if one["kind"] == "runs"] == [str(run)]


def test_a_document_is_ascii_which_every_stream_and_terminal_takes(ftcore):
    outcome = ftcore("check", "json=true", "model=tiny", "name=é 你", "run=null", "output_dir=a\u202e\x9b")
    assert document(outcome)["config"]["output_dir"] == "a\u202e\x9b" and outcome.out.isascii()
