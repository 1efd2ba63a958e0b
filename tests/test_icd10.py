"""Rows of the classification: right answers, each question once, and no category on both sides."""

import sys
from types import SimpleNamespace

import pytest

from ftcore.data.icd10 import ICD10
from ftcore.data.records import RECORD_TYPES
from ftcore.errors import ConfigError
from ftcore.rewards.answers import is_right
from tests.conftest import FAST
from tests.test_data import data

INJURY = "Injury, poisoning and certain other consequences of external causes"


def icd10(depth=4, max_per_chapter=None, **changes):
    return ICD10(**vars(data(**changes)), depth=depth, max_per_chapter=max_per_chapter)


def ids(records):
    return {row["id"] for row in [*records.train, *records.validation, *records.test]}


@pytest.fixture(scope="module")
def records():
    pytest.importorskip("simple_icd_10_cm")  # here, since collecting tests should not read it
    return icd10(validation_share=0.1).load("preference")


@pytest.mark.parametrize(
    ("code", "chapter"),
    [
        ("S72", INJURY),
        ("S72.0", INJURY),
        ("E11", "Endocrine, nutritional and metabolic diseases"),
        ("C50", "Neoplasms"),  # also the name of a block
        ("O9A.1", "Pregnancy, childbirth and the puerperium"),
        ("U07.1", "Codes for special purposes"),
    ],
)
def test_the_answer_is_the_title_of_the_codes_chapter(records, code, chapter):
    row = next(row for row in [*records.train, *records.validation, *records.test] if row["id"] == code)
    assert (row["completion"], row["chosen"], row["answer"], row["group"]) == (chapter, chapter, [chapter], code[:3])


def test_a_question_is_the_description_and_the_wrong_answer_another_chapter(records):
    row = next(row for row in [*records.train, *records.validation, *records.test] if row["id"] == "S72")
    assert row["prompt"] == "In which ICD-10-CM chapter is this coded: Fracture of femur?"
    titles = {row["chosen"] for row in records.train}
    assert len(titles) == 22 and {row["rejected"] for row in records.train if row["chosen"] == INJURY} == titles - {
        INJURY
    }
    assert all(row["rejected"] in titles - {row["chosen"]} for row in records.train)


def test_no_title_counts_as_right_for_another_chapter(records):
    titles = {row["chosen"] for row in records.train}
    assert {(one, other) for one in titles for other in titles if is_right(one, [other])} == {(t, t) for t in titles}


def test_a_category_and_a_question_are_on_one_side(records):
    parts = records.train, records.validation, records.test
    for column in ("group", "prompt"):
        sides = [{row[column] for row in part} for part in parts]
        assert all(sides) and sum(map(len, sides)) == len(set.union(*sides))
    shares = [len(part) / len(ids(records)) for part in parts]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert len({row["prompt"].lower() for part in parts for row in part}) == len(ids(records)) > 11_000


def test_the_same_rows_are_chosen_each_time_and_fewer_are_some_of_them(records):
    some = icd10(max_per_chapter=30).load("prompt_completion")
    assert icd10(max_per_chapter=30).load("prompt_completion").content_hash == some.content_hash
    counts = [
        sum(row["completion"] == title for row in [*some.train, *some.test])
        for title in {r["completion"] for r in some.train}
    ]
    assert sorted(counts) == [5] + 21 * [30]
    fewer = icd10(max_per_chapter=10).load("prompt_completion")
    assert ids(fewer) < ids(some) < ids(records)
    assert {row["id"] for row in fewer.test} < {row["id"] for row in some.test} < {row["id"] for row in records.test}
    assert ids(icd10(depth=3).load("prompt_completion")) < ids(records)


def test_the_first_held_out_rows_are_of_many_chapters(records):
    assert len({row["chosen"] for row in records.test[:40]}) > 10


@pytest.mark.parametrize("record_type", RECORD_TYPES)
def test_every_record_type_has_its_columns(records, record_type):
    loaded = icd10(max_per_chapter=5).load(record_type)
    assert loaded.train and loaded.test
    assert all(row[column] is not None for row in loaded.train for column in RECORD_TYPES[record_type])


def test_the_question_can_be_asked_in_other_words(records):
    words = icd10(depth=3, columns={"prompt": "Chapter of {description}:"}).load("prompt_completion")
    assert next(row["prompt"] for row in words.train if row["id"] == "S72") == "Chapter of Fracture of femur:"


def test_of_codes_with_the_same_description_the_shortest_and_then_the_first_stays(monkeypatch):
    tree = {
        "B00.1": "Other pox",
        "A00.0": "Pox",
        "B00": "Pox!",
        "A01": "Fever",
        "A01.0": "Other  pox",
        "A01.1": "Mild fever",
    }
    fake = SimpleNamespace(
        get_all_codes=lambda: [*tree, "1", "2"],
        is_category_or_subcategory=tree.__contains__,
        get_description=lambda code: tree.get(code) or f"Chapter {code} ({code}-{code})",
        get_ancestors=lambda code: [code[:3], "1" if code < "B" else "2"],
    )
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", fake)
    found = icd10().load("prompt_completion")
    assert {row["id"]: row["completion"] for row in [*found.train, *found.test]} == {
        "A01": "Chapter 1", "B00": "Chapter 2", "A01.0": "Chapter 1", "A01.1": "Chapter 1",
    }  # fmt: skip


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    with pytest.raises(ConfigError):
        icd10().load("prompt_completion")
    assert "pip install 'ftcore[icd10]'" in fails(2, "data=icd10", *FAST)


def test_a_local_copy_is_read_instead(rows):
    copy = icd10(path=rows({"prompt": "Chapter?", "completion": "Neoplasms"}), test_share=0.0)
    assert [row["prompt"] for row in copy.load("prompt_completion").train] == ["Chapter?"]


def test_a_step_of_grpo_is_scored_by_the_answers(records, ftcore):
    words = ["method=grpo", "data=icd10", "data.max_per_chapter=5", "max_steps=1", "hardware=cpu", *FAST]
    outcome = ftcore(*words)
    assert outcome.status == 0, outcome.err
    assert any("contains_answer" in key for key in outcome.metrics[0]), outcome.metrics[0]
    assert outcome.summary
