"""Rows are read strictly: right, or refused with file, line and reason and without a word of their content."""

import json
import re
from collections import Counter

import pytest

from dev import build_medical
from ftcore.data.records import Data
from ftcore.data.sources import read_jsonl
from ftcore.errors import DataError
from ftcore.resources import PACKAGE

MEDICAL = PACKAGE / "datasets" / "medical"
GOOD = {"prompt": "secret question?", "completion": "secret answer"}


def data(path=None, **changes):
    fields = {
        "path": path, "splits": {}, "records": {}, "columns": {}, "test_share": 0.1, "validation_share": 0.0,
        "max_length": 512, "too_long": "error", "chat": "auto",
    }  # fmt: skip
    return Data(**(fields | changes))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, b'{"prompt": "x", }'], r"rows.jsonl:2, column \d+: not valid JSON"),
        ([GOOD, b'{"prompt": "secret'], r"rows.jsonl:2, column \d+: not valid JSON"),
        ([GOOD, b"[1, 2]"], r"rows.jsonl:2: .* JSON object, not an array"),
        ([GOOD, b"3"], r"rows.jsonl:2: .* JSON object, not a number"),
        (
            [GOOD, {"prompt": "a", "answer": "b"}],
            r"rows.jsonl:2: there is no column 'completion'; the row has answer, prompt",
        ),
        ([GOOD, {**GOOD, "completion": None}], r"rows.jsonl:2: column 'completion' must be text, not null"),
        ([GOOD, {**GOOD, "completion": 5}], r"rows.jsonl:2: column 'completion' must be text, not int"),
        ([GOOD, {**GOOD, "completion": " "}], r"rows.jsonl:2: column 'completion' is empty"),
        ([GOOD, b'{"prompt": "a\\u0000b", "completion": "c"}'], r"rows.jsonl:2: holds a NUL"),
        ([GOOD, b'{"prompt": "a\\ud800", "completion": "c"}'], r"rows.jsonl:2: holds half of a surrogate pair"),
        ([GOOD, b'{"prompt": "\xff"}'], r"rows.jsonl:2: byte 13 is not UTF-8"),
        ([GOOD, b'{"prompt": NaN, "completion": "c"}'], r"rows.jsonl:2: not valid JSON: NaN"),
        ([GOOD, b"[" * 100_000], r"rows.jsonl:2"),
        ([GOOD, {**GOOD, "answer": 5}], r"rows.jsonl:2: column 'answer' must be text or a list"),
        ([b""], r"has 0 rows"),
    ],
)
def test_a_bad_row_is_refused_with_file_line_and_reason(rows, lines, message):
    with pytest.raises(DataError, match=message) as error:
        data(rows(*lines)).load("prompt_completion")
    assert "secret" not in str(error.value)


def test_a_file_cut_off_in_its_last_line_is_said_to_be_incomplete(tmp_path):
    file = tmp_path / "cut.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "x", "comp')
    with pytest.raises(DataError, match=r"cut.jsonl:2.*may be incomplete"):
        list(read_jsonl(str(file)))


def test_a_missing_file_is_named_as_resolved_with_the_working_directory(fails):
    message = fails(3, "data=jsonl", "data.path=nope.jsonl")
    assert "nope.jsonl" in message and "working directory" in message


def test_byte_order_mark_crlf_blank_lines_and_line_separators_are_accepted(tmp_path):
    file = tmp_path / "odd.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '{"text": "a\u2028b"}\r\n\r\n{"text": "c"}\r\n'.encode())
    assert [(line, row["text"]) for line, row in read_jsonl(str(file))] == [(1, "a\u2028b"), (3, "c")]


def test_columns_are_mapped_target_to_source(rows):
    path = rows(*({"question": f"q{k}", "answer": f"a{k}"} for k in range(20)))
    records = data(path, columns={"prompt": "question", "completion": "answer"}).load("prompt_completion")
    assert {row["prompt"] for row in records.train} <= {f"q{k}" for k in range(20)}


def test_split_depends_on_the_text_alone(rows):
    lines = [{"prompt": f"question {k}", "completion": "x"} for k in range(300)]
    first = data(rows(*lines)).load("prompt_completion")
    shuffled = data(rows(*lines[::-1], name="other.jsonl")).load("prompt_completion")
    assert {r["prompt"] for r in first.test} == {r["prompt"] for r in shuffled.test}
    assert 10 < len(first.test) < 60
    fewer = data(rows(*lines[:150], name="third.jsonl")).load("prompt_completion")
    assert {r["prompt"] for r in fewer.test} <= {r["prompt"] for r in first.test}


def test_equal_questions_never_stand_on_both_sides(rows):
    lines = [{"prompt": f"Question {k % 40}{'?' * (k % 3)}", "completion": f"x{k}"} for k in range(200)]
    records = data(rows(*lines), test_share=0.3).load("prompt_completion")
    sides = [{re.sub(r"\W", "", r["prompt"]) for r in part} for part in (records.train, records.test)]
    assert not sides[0] & sides[1]


def test_a_share_holds_out_at_least_one_row_and_trains_on_the_rest(rows):
    records = data(rows(*({"prompt": f"{k}", "completion": "x"} for k in range(5)))).load("prompt_completion")
    assert len(records.test) >= 1 and records.train


def test_content_hash_changes_with_one_letter(rows):
    one = data(rows(GOOD, {**GOOD, "prompt": "b"})).load("prompt_completion").content_hash()
    two = data(rows(GOOD, {**GOOD, "prompt": "c"})).load("prompt_completion").content_hash()
    assert one != two


def test_a_record_type_that_is_missing_names_the_data_options_that_have_it(fails):
    with pytest.raises(DataError, match=r"no preference rows .* Data options that have them: jsonl, medical"):
        data(records={"text": {"train": "x"}}).load("preference")


def test_test_and_validation_rows_are_shares_of_their_own(rows):
    lines = [{"prompt": f"question {k}", "completion": "x"} for k in range(1000)]
    records = data(rows(*lines), test_share=0.1, validation_share=0.1).load("prompt_completion")
    assert all(60 < len(part) < 140 for part in (records.test, records.validation))
    assert len(records.train) + len(records.validation) + len(records.test) == 1000


def test_eval_of_other_data_takes_all_its_rows(rows):
    records = data(rows(*({"prompt": f"{k}", "completion": "x"} for k in range(9)))).whole("prompt_completion")
    assert len(records.test) == 9 and not records.train


def test_own_path_beside_an_option_with_its_own_rows_is_refused(fails):
    assert "data=jsonl" in fails(3, "data.path=my.jsonl")


def test_a_mapped_column_wins_over_one_of_its_name_and_a_source_can_serve_twice(rows):
    line = {"prompt": "old", "question": "new", "completion": "x"}
    path = rows(line, {**line, "question": "newer"})
    records = data(path, columns={"prompt": "question", "completion": "question"}, test_share=0).load(
        "prompt_completion"
    )
    assert [(row["prompt"], row["completion"]) for row in records.train] == [("new", "new"), ("newer", "newer")]


def test_a_misspelt_target_column_is_refused(rows):
    with pytest.raises(DataError, match=r"promt means nothing .* prompt"):
        data(rows(GOOD), columns={"promt": "q"}).load("prompt_completion")


# The rows that ship with ftcore.


def medical(name):
    return [json.loads(line) for line in (MEDICAL / f"{name}.jsonl").read_text().splitlines()]


def test_medical_files_are_what_the_facts_give():
    for file, content in build_medical.build().items():
        assert (MEDICAL / file).read_text() == content, "run `make data`"


def test_medical_has_the_rows_it_promises():
    facts = medical("facts")
    assert len(facts) >= 160
    assert all(len(fact["questions"]) >= 3 for fact in facts)
    passages = medical("passages.train") + medical("passages.test")
    assert len(passages) >= 120 and all(40 <= len(row["text"].split()) <= 120 for row in passages)
    assert len(medical("preference.train")) >= 300
    for name in (
        "sft.train",
        "sft.test",
        "prompts.train",
        "prompts.test",
        "preference.train",
        "passages.train",
        "cloze.test",
    ):
        rows = medical(name)
        assert len({row["id"] for row in rows}) == len(rows) and all(row["fact"] for row in rows)


def test_the_held_out_phrasing_is_seen_nowhere_in_training():
    def normal(text):
        return " ".join(re.findall(r"\w+", text.lower()))

    seen = {
        normal(row["prompt"]) for name in ("sft.train", "prompts.train", "preference.train") for row in medical(name)
    }
    held_out = [row for name in ("sft.test", "prompts.test", "preference.test") for row in medical(name)]
    assert len(held_out) == 3 * len(medical("facts")) and not [row for row in held_out if normal(row["prompt"]) in seen]


def test_no_question_gives_its_answer_away_and_no_wrong_answer_is_right():
    from ftcore.answers import is_right

    for fact in medical("facts"):
        assert is_right(fact["completion"], fact["accept"])
        assert not any(is_right(text, fact["accept"]) for text in [*fact["questions"], *fact["wrong"]]), fact["id"]


def test_general_probe_and_replay_share_no_text():
    folder = PACKAGE / "datasets" / "general"
    texts = Counter(
        line for name in ("train", "test") for line in (folder / f"passages.{name}.jsonl").read_text().splitlines()
    )
    assert len(texts) >= 40 and max(texts.values()) == 1
