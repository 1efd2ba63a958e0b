"""Rows that repeat, and held-out rows that training shows, are found and named."""

import random
from pathlib import Path

import pytest

from ftcore.data.sources import rows_of
from ftcore.data.splits import normalised
from ftcore.errors import DataError
from tests.test_data import data

REAL = Path(__file__).parents[2] / "shared" / "data"
WORDS = [f"word{k}" for k in range(500)]


def row(seed, **changes):
    random.seed(seed)
    return {"prompt": f"question {seed}", "completion": " ".join(random.choices(WORDS, k=40)), **changes}


def loaded(rows, train, test, **changes):
    files = {"train": rows(*train), "test": rows(*test, name="test.jsonl")}
    return data(splits=files, **changes).load("prompt_completion")


def test_repeated_rows_are_counted_and_dropped_where_asked(rows):
    lines = [row(1), row(2), row(1, prompt="Question, 1!"), row(1, completion="another")]
    kept = loaded(rows, lines, [row(9)])
    assert (
        len(kept.train) == 4 and "1 training rows repeat another (rows.jsonl:3 repeats rows.jsonl:1)" in kept.notes[0]
    )
    assert len(loaded(rows, lines, [row(9)], duplicates="drop").train) == 3


def test_a_held_out_question_that_is_trained_on_is_an_error_unless_allowed(rows):
    with pytest.raises(DataError, match=r"test.jsonl:2 is held out and rows.jsonl:1 trains .* 1 of 2") as error:
        loaded(rows, [row(1), row(2)], [row(3), row(1, prompt="QUESTION 1?")])
    assert "question" not in str(error.value).replace("same question", "")
    allowed = loaded(rows, [row(1), row(2)], [row(3), row(1)], leakage="allow")
    assert allowed.notes == ("1 of 2 held-out rows are in training (test.jsonl:2 as rows.jsonl:1)",)


def test_a_held_out_text_that_nearly_is_in_training_is_said(rows):
    near = row(1)["completion"].split()
    changed = row(7, completion=" ".join([*near[:35], *["new"] * 5]))
    other = row(8, completion=" ".join([*near[:15], *["new"] * 25]))
    assert loaded(rows, [row(1)], [changed, other]).notes == (
        "1 of 2 held-out rows nearly are in training (test.jsonl:1)",
    )


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not here")
def test_faults_put_into_real_rows_are_reported_with_their_line(rows):
    train = [line for _, line in rows_of(str(REAL / "medquad_sft" / "train.jsonl"))]
    test = [line for _, line in rows_of(str(REAL / "medquad_sft" / "test.jsonl"))]
    clean = loaded(rows, train, test)
    with pytest.raises(DataError, match=r"rows.jsonl:101: column 'completion' must be text, not null"):
        loaded(rows, [*train[:100], {**train[100], "completion": None}, *train[101:]], test)
    notes = loaded(rows, [*train, train[7]], test).notes
    assert any(f"rows.jsonl:{len(train) + 1} repeats rows.jsonl:8" in note for note in notes) and notes != clean.notes
    with pytest.raises(DataError, match=rf"test.jsonl:{len(test) + 1} is held out and rows.jsonl:8 trains"):
        loaded(rows, train, [*test, train[7]])


SAME = [
    ("caf\u00e9?", "cafe\u0301?"), ("wo\u200brd", "word"), ("co\u00adoperate", "cooperate"),
    ("\uff21\uff22", "ab"),
    ("\ufb01ne", "fine"), ("Straße", "STRASSE"), ("\u0130stanbul", "i\u0307stanbul"),
    ("An X-ray!", "an x ray"), ("7 + 3", "7  +  3?"), ("x+1", "x + 1"), ("and/or", "and or"), ("Don't!", "don t"),
    ("It's caf\u00e9!", "it s cafe\u0301"),
]  # fmt: skip
OTHER = [
    ("7 + 3", "7 - 3"), ("7+3", "7-3"), ("Is C fast?", "Is C++ fast?"), ("Is C fast?", "Is C# fast?"), ("की", "का"),
    ("কি", "কা"), ("x < y", "x > y"), ("5 €", "5 $"), ("naive", "naïve"), ("x+1", "x-1"), ("p<0.05", "p>0.05"), ("5", "-5"),
    ("f(x)?", "f'(x)?"), ("a=b", "a!=b"), ("Is A- rare?", "Is A rare?"), ("größer -5", "größer 5"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME)
def test_spellings_of_one_question_are_the_same(one, other):
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_signs_and_marks_make_another_question(one, other):
    assert normalised(one) != normalised(other)
