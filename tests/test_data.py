"""Rows are read strictly: right, or refused with file, line and reason and without a word of their content."""

import json
import re
from collections import Counter

import pytest

from dev import build_medical
from ftcore.data.records import Data
from ftcore.data.sources import rows_of
from ftcore.errors import DataError
from ftcore.files import PACKAGE

MEDICAL = PACKAGE / "datasets" / "medical"
GOOD = {"prompt": "secret question?", "completion": "secret answer"}


def data(path=None, **changes):
    fields = {
        "path": path, "splits": {}, "records": {}, "columns": {}, "values": {}, "cloze": None, "test_share": 0.1,
        "validation_share": 0.0, "max_length": 512, "too_long": "error", "chat": "auto", "on_bad_row": "fail",
        "max_bad_rows": 3, "duplicates": "keep", "leakage": "error", "hub": None, "control_characters": "error",
        "max_lost": 0.05, "max_line_mb": 64,
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
        (
            [GOOD, b'{"prompt": "a\\u0000b", "completion": "c"}'],
            r"rows.jsonl:2: prompt holds a character that prints nothing \(U",
        ),
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
        list(rows_of(str(file)))


def test_a_missing_file_is_named_as_resolved_with_the_working_directory(fails):
    message = fails(3, "data=jsonl", "data.path=nope.jsonl")
    assert "nope.jsonl" in message and "working directory" in message


def test_byte_order_mark_crlf_blank_lines_and_line_separators_are_accepted(tmp_path):
    file = tmp_path / "odd.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '{"text": "a\u2028b"}\r\n\r\n{"text": "c"}\r\n'.encode())
    assert [(where, row["text"]) for where, row in rows_of(str(file))] == [
        ("odd.jsonl:1", "a\u2028b"),
        ("odd.jsonl:3", "c"),
    ]


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
    one = data(rows(GOOD, {**GOOD, "prompt": "b"})).load("prompt_completion").content_hash
    two = data(rows(GOOD, {**GOOD, "prompt": "c"})).load("prompt_completion").content_hash
    assert one != two


def test_a_record_type_that_is_missing_names_the_data_options_that_have_it(fails):
    with pytest.raises(DataError, match=r"no preference rows .* Data options that have them: .*jsonl, medical"):
        data(records={"text": {"train": "x"}}).load("preference")


def test_test_and_validation_rows_are_shares_of_their_own(rows):
    lines = [{"prompt": f"question {k}", "completion": "x"} for k in range(1000)]
    records = data(rows(*lines), test_share=0.1, validation_share=0.1).load("prompt_completion")
    assert all(60 < len(part) < 140 for part in (records.test, records.validation))
    assert len(records.train) + len(records.validation) + len(records.test) == 1000


def test_eval_of_other_data_takes_all_its_rows(rows):
    records = data(rows(*({"prompt": f"{k}", "completion": "x"} for k in range(9)))).load_as_test("prompt_completion")
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


# Conversations, labels, margins, and rows of one type made of another's.

ASKED = {"role": "user", "content": "secret question?"}
ANSWERED = {"role": "assistant", "content": "secret answer"}
RULE = {"role": "system", "content": "secret rule"}
PAIR = {"prompt": "secret question?", "chosen": "secret answer", "rejected": "secret mistake"}


@pytest.mark.parametrize(
    ("before", "roles"), [([], "ua"), ([RULE], "sua"), ([ASKED, ANSWERED], "uaua"), ([RULE, ASKED, ANSWERED], "suaua")]
)
def test_a_conversations_last_question_and_answer_are_prompt_and_completion(rows, before, roles):
    last = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Now."}]
    path = rows({"messages": [*before, *last], "prompt": "something else"})
    (row,) = data(path, test_share=0).load("prompt_completion").train
    assert (row["prompt"], row["completion"]) == ("And now?", "Now.")
    assert "".join(message["role"][0] for message in row["messages"]) == roles


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("secret", "messages must be a list of objects"),
        ({"role": "user", "content": "secret"}, "messages must be a list of objects"),
        ([ASKED, "secret"], "messages must be a list of objects"),
        (None, "messages must be a list of objects"),
        ([], "user and assistant must take turns, and the assistant comes last"),
        ([RULE], "the roles are system"),
        ([ASKED], "the roles are user"),
        ([ASKED, ANSWERED, ASKED], "the roles are user, assistant, user"),
        ([ANSWERED, ASKED], "the roles are assistant, user"),
        ([ASKED, ASKED, ANSWERED], "the roles are user, user, assistant"),
        ([RULE, RULE, ASKED, ANSWERED], "after at most one system message"),
        ([ASKED, RULE, ANSWERED], "the roles are user, system, assistant"),
        ([ASKED, {**ANSWERED, "role": "secret"}], "a role is not one of system, user, assistant"),
        ([ASKED, {**ANSWERED, "role": ["secret"]}], "a role is not one of system, user, assistant"),
        ([ASKED, {"content": "secret"}], "message 2 does not say who speaks; its keys are .content."),
        ([ASKED, {**ANSWERED, "content": " \n"}], "message 2 has no text in 'content'"),
        ([ASKED, {"role": "assistant"}], "message 2 has no text in 'content'"),
        (
            [{**ASKED, "content": [{"type": "image", "url": "secret"}]}, ANSWERED],
            "message 1: .* a part of the type image",
        ),
    ],
)
def test_messages_that_are_no_conversation_are_refused_with_file_and_line(rows, messages, message):
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{message}") as error:
        data(rows(GOOD, {"messages": messages})).load("prompt_completion")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("record_type", "row", "message"),
    [
        ("preference", {**PAIR, "margin": "secret"}, "column 'margin' must be a number"),
        ("preference", {**PAIR, "margin": True}, "column 'margin' must be a number"),
        ("preference", {**PAIR, "margin": None}, "column 'margin' must be a number"),
        ("preference", {**PAIR, "margin": int("9" * 400)}, "column 'margin' must be a number below 1e30"),
        ("unpaired", {**GOOD, "label": 2}, "column 'label' must be true or false, .*, not int"),
        ("unpaired", {**GOOD, "label": "secret"}, "column 'label' must be true or false, .*, not str"),
        ("unpaired", {**GOOD, "label": None}, "column 'label' must be true or false, .*, not null"),
        ("unpaired", GOOD, "there is no column 'label'"),
        ("unpaired", {**PAIR, "chosen": ""}, "column 'completion' is empty"),
        ("preference", {**PAIR, "chosen": 5}, "is not the pairs of conversations .* that its columns say"),
    ],
)
def test_a_bad_margin_label_or_side_is_refused_with_file_and_line(rows, record_type, row, message):
    good = {**PAIR, "margin": 1} if record_type == "preference" else {**GOOD, "label": False}
    with pytest.raises(DataError, match=f"rows.jsonl:2: {message}") as error:
        data(rows(good, row)).load(record_type)
    assert "secret" not in str(error.value)


def test_pairs_are_taken_apart_into_good_and_bad_answers_that_stay_on_one_side(rows):
    lines = [{"id": k, "prompt": f"question {k}", "chosen": f"right {k}", "rejected": f"wrong {k}"} for k in range(60)]
    records = data(rows(*lines), test_share=0.3).load("unpaired")
    sides = [{row["id"].split("/")[0] for row in part} for part in (records.train, records.test)]
    assert not sides[0] & sides[1] and len(records.train) + len(records.test) == 120
    for row in records.train + records.test:
        number, side = row["id"].split("/")
        assert (row["completion"], row["label"]) == {
            "chosen": (f"right {number}", True),
            "rejected": (f"wrong {number}", False),
        }[side]


def test_labelled_rows_stay_as_they_are_and_a_label_wins_over_a_pair(rows):
    path = rows({**GOOD, "label": False}, {**PAIR, "completion": "own", "label": True})
    train = data(path, test_share=0).load("unpaired").train
    assert [(row["completion"], row["label"]) for row in train] == [("secret answer", False), ("own", True)]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({"prompt": "Is it a bone?", "completion": "Yes."}, "Is it a bone?\nYes."),
        ({"prompt": "Is it a bone?", "completion": "Yes.", "text": "A passage."}, "A passage."),
        ({"text": "A passage."}, "A passage."),
    ],
)
def test_a_text_is_its_column_or_question_and_answer(rows, line, text):
    (row,) = data(rows(line), test_share=0).load("text").train
    assert row["text"] == text


@pytest.mark.parametrize(
    ("wanted", "there", "made"),
    [
        ("unpaired", "preference", {"completion": "secret answer", "label": True}),
        ("prompt", "prompt_completion", {"prompt": "secret question?"}),
        ("text", "prompt_completion", {"text": "secret question?\nsecret answer"}),
    ],
)
def test_a_data_option_without_a_type_gives_it_from_another_of_its_types(rows, wanted, there, made):
    path = rows({**GOOD, **PAIR})
    (row, *_) = data(records={there: {"train": path}}, test_share=0).load(wanted).train
    assert made.items() <= row.items()
    with pytest.raises(DataError, match=f"no {wanted} rows .it has: other"):
        data(records={"other": {"train": path}}).load(wanted)


def test_the_type_itself_is_preferred_to_one_it_can_be_made_of(rows):
    own, other = rows({**GOOD, "label": False}, name="own.jsonl"), rows(PAIR, name="other.jsonl")
    option = data(records={"preference": {"train": other}, "unpaired": {"train": own}}, test_share=0)
    assert [row["label"] for row in option.load("unpaired").train] == [False]


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
    from ftcore.rewards.answers import is_right

    for fact in medical("facts"):
        assert is_right(fact["completion"], fact["accept"])
        assert not any(is_right(text, fact["accept"]) for text in [*fact["questions"], *fact["wrong"]]), fact["id"]


def test_general_probe_and_replay_share_no_text():
    folder = PACKAGE / "datasets" / "general"
    texts = Counter(
        line for name in ("train", "test") for line in (folder / f"passages.{name}.jsonl").read_text().splitlines()
    )
    assert len(texts) >= 40 and max(texts.values()) == 1


def test_the_files_of_a_folder_that_are_named_for_splits_are_the_splits(tmp_path):
    for part, question in {"train": "one", "test": "two", "other": "three"}.items():
        (tmp_path / f"{part}.jsonl").write_text(json.dumps({"prompt": question, "completion": "yes"}) + "\n")
    found = data(str(tmp_path)).load("prompt_completion")
    assert [[row["prompt"] for row in part] for part in (found.train, found.validation, found.test)] == [
        ["one"],
        [],
        ["two"],
    ]
    assert "its files train (1), test (1) are the splits" in found.notes[0]
    (tmp_path / "test.jsonl").unlink()
    everything = data(str(tmp_path), test_share=0.0).load("prompt_completion")
    assert {row["prompt"] for row in everything.train} == {"one", "three"}


def test_a_transcript_in_the_prompt_is_a_conversation(rows):
    before = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    found = data(rows({"prompt": before, "chosen": " So.", "rejected": " No."}), test_share=0.0).load("preference")
    (row,) = found.train
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Why?", "So.", "No.")
    assert [message["content"] for message in row["messages"]] == ["Hi?", "Hello.", "Why?", "So."]
    assert "transcripts (prompt)" in found.notes[0]
    with pytest.raises(DataError, match="must take turns"):
        broken = before.replace("\n\nAssistant: Hello.", "")
        data(rows({"prompt": broken, "chosen": " So.", "rejected": " No."}), test_share=0.0).load("preference")


@pytest.mark.parametrize(
    "text", ["a\u200bb", "a\x85b", "a\u2062b", "a\ufff9b", "a\U000e0041b", "\u3164\u2800", "\u180ea"]
)
def test_what_prints_nothing_is_refused(rows, text):
    with pytest.raises(DataError, match="prints nothing|is empty"):
        data(rows({**GOOD, "prompt": text})).load("prompt_completion")


@pytest.mark.parametrize(
    "text",
    ["Wör\u00adter", "नमस्\u200cते", "1\u200f2", "❤\ufe0f", "\U0001f3f4\U000e0067\U000e0062\U000e007f", "한글"],
)
def test_what_belongs_to_scripts_and_emoji_is_read(rows, text):
    other = {"prompt": "Another?", "completion": "Yes."}
    assert {**GOOD, "prompt": text}.items() <= data(rows({**GOOD, "prompt": text}, other), test_share=0.0).load(
        "prompt_completion"
    ).train[0].items()
