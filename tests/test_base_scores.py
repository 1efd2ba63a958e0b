"""The base model is scored once for all runs that compare with it in the same way, and no run gets another's scores."""

import json

import pytest

from ftcore.evaluate import score as module
from ftcore.train import before_after
from tests.conftest import FAST

WORDS = [*FAST, "hardware=cpu", "max_steps=1"]


@pytest.fixture
def scored(monkeypatch, tmp_path):
    """Which models were scored; a home of its own."""
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path / "home"))
    labels, score = [], before_after.score

    def noted(method, held_out, settings, label):
        labels.append(label)
        return score(method, held_out, settings, label)

    monkeypatch.setattr(before_after, "score", noted)
    return labels


def test_another_learning_rate_adapter_and_name_find_the_base_models_scores(ftcore, scored):
    first = ftcore(*WORDS)
    again = ftcore(*WORDS, "method.lr=1e-4", "adapter.rank=4", "name=other")
    assert scored == ["base model", "tuned model", "tuned model"]
    assert "scores of an earlier run" in again.out and "scores of an earlier run" not in first.out
    assert again.summary["base"] == first.summary["base"] != again.summary["tuned"]
    assert (again.folder / "base.json").read_text() == (first.folder / "base.json").read_text()


@pytest.mark.parametrize(
    "change",
    ["evaluate.max_rows=5", "evaluate.max_new_tokens=5", "seed=1", "method=dpo", "private=true",
     "evaluate.probe=ftcore://general/passages.test.jsonl"],
)  # fmt: skip
def test_what_changes_the_scores_or_who_may_read_them_is_scored_anew(ftcore, scored, change):
    ftcore(*WORDS)
    assert ftcore(*WORDS, change).status == 0
    assert scored == 2 * ["base model", "tuned model"]  # seed: the tiny model's weights are random


def test_changed_code_and_code_of_others_score_anew(ftcore, scored, monkeypatch):
    ftcore(*WORDS)
    monkeypatch.setattr("ftcore.evaluate.base_scores.code_hash", lambda _: "other")
    ftcore(*WORDS)
    ftcore(*WORDS, "trust=[tests]")
    assert scored.count("base model") == 3


def test_sampled_completions_are_not_kept(ftcore, scored, tmp_path):
    words = [
        *WORDS,
        "method=grpo",
        "method.max_new_tokens=4",
        "method.rewards=[length]",
        "method.reward_options.length.limit=2",
    ]
    assert ftcore(*words).status == 0
    assert not (tmp_path / "home" / "scores").exists()


@pytest.mark.parametrize("text", ["[", "[{}, []]"])
def test_a_damaged_file_is_named(ftcore, fails, scored, tmp_path, text):
    ftcore(*WORDS)
    (file,) = (tmp_path / "home" / "scores").iterdir()
    assert json.loads(file.read_text())
    file.write_text(text)
    assert str(file) in fails(7, *WORDS)


def test_no_place_to_keep_them_is_no_failure(ftcore, scored, tmp_path):
    ftcore(*WORDS)
    folder = tmp_path / "home" / "scores"
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.touch()
    assert ftcore(*WORDS).status == 0
    assert scored == 2 * ["base model", "tuned model"]


@pytest.mark.parametrize(("rows", "most"), [(40, 5), (200, 25), (3, 1)])
def test_eight_processes_share_the_rows_evenly(rows, most, monkeypatch):
    """Batches of 16: three of them would leave five processes idle."""
    shares = []
    for rank in range(8):
        monkeypatch.setattr(module, "rank_and_world", lambda rank=rank: (rank, 8))
        shares.append([row for batch in module._batches(list(range(rows)), 16, "") for row in batch])
    assert sorted(row for share in shares for row in share) == list(range(rows))
    assert max(map(len, shares)) == most


def test_scores_do_not_depend_on_which_rows_share_a_batch(ftcore, scored):
    """KTO's z is a mean over rows."""
    words = [*FAST, "hardware=cpu", "method=kto", "max_steps=3", "method.lr=0.01", "evaluate.max_rows=7"]
    one, other = (ftcore(*words, f"evaluate.batch_size={size}").summary["tuned"] for size in (2, 7))
    assert one["kl"] > 1e-4 and one == pytest.approx(other, abs=1e-5)
