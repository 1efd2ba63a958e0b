"""What a team's files may hold and what the command line then says: exit code, file and line, and no word of a row."""

import json

import pytest

from ftcore.errors import DataError
from tests.conftest import FAST
from tests.test_data import data

SECRET = "zebra-1234"
GOOD = {"prompt": f"What is {SECRET}?", "completion": f"It is {SECRET}."}
MANY = [{"prompt": f"{SECRET} number {k}?", "completion": f"It is {k} {SECRET}."} for k in range(20)]


def command(path, *words):
    return [*FAST, "hardware=cpu", "data=jsonl", f"data.path={path}", "dry_run=true", "retention.weight=0", *words]


def spoken(role, text=SECRET):
    return {"role": role, "content": text}


def turns(*roles):
    return [{"messages": [spoken(role) for role in roles]}]


def with_(**changes):
    return {**GOOD, **changes}


REFUSED = {
    "an empty file": ([b""], ["rows.jsonl", "0 rows"]),
    "invalid JSON": ([GOOD, b'{"prompt": "zebra-1234", }'], ["rows.jsonl:2, column ", "not valid JSON"]),
    "a line that is an array": ([GOOD, b'["zebra-1234"]'], ["rows.jsonl:2", "not an array"]),
    "a line that is a number": ([GOOD, b"1234"], ["rows.jsonl:2", "not a number"]),
    "a missing column": ([GOOD, {"prompt": SECRET}], ["rows.jsonl:2", "no column 'completion'", "has prompt", "data.columns"]),
    "a null field": ([GOOD, with_(completion=None)], ["rows.jsonl:2", "'completion' must be text, not null"]),
    "a wrong type": ([GOOD, with_(completion=5)], ["rows.jsonl:2", "'completion' must be text, not int"]),
    "a lone surrogate": ([GOOD, b'{"prompt": "zebra-1234 \\ud800", "completion": "x"}'], ["rows.jsonl:2", "surrogate"]),
    "a NUL": ([GOOD, with_(prompt=f"{SECRET}\0")], ["rows.jsonl:2", "U+0000", "character 11", "data.control_characters=allow"]),
    "a control character": ([GOOD, with_(completion=f"{SECRET}\x1b[1m")], ["rows.jsonl:2", "U+001B"]),
    "another encoding": ([GOOD, b'{"prompt": "zebra-1234 \xe9", "completion": "x"}'], ["rows.jsonl:2", "byte 24 is not UTF-8"]),
    "a row that is too long": ([*MANY, with_(prompt=f"{SECRET} " * 500)], ["rows.jsonl:21", "tokens", "data.too_long=truncate"]),
    "an empty prompt": ([GOOD, with_(prompt=" ")], ["rows.jsonl:2", "'prompt' is empty"]),
    "an empty completion": ([GOOD, with_(completion="")], ["rows.jsonl:2", "'completion' is empty"]),
    "roles out of order": (turns("user", "user", "assistant"), ["rows.jsonl:1", "take turns"]),
    "two system messages": (turns("system", "system", "user", "assistant"), ["rows.jsonl:1", "at most one"]),
    "an unknown role": (turns("narrator", "assistant"), ["rows.jsonl:1", "system, user, assistant"]),
    "no final answer": (turns("user", "assistant", "user"), ["rows.jsonl:1", "assistant comes last"]),
    "no question": ([{"messages": []}], ["rows.jsonl:1", "take turns"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_file_line_and_reason(fails, rows, case):
    lines, expected = REFUSED[case]
    message = fails(3, *command(rows(*lines), "data.test_share=0"))
    assert all(part in message for part in expected), message
    assert SECRET not in message and message.count("\n") == 1


@pytest.mark.parametrize("path", ["nowhere.jsonl", "nowhere/*.jsonl"])
def test_a_path_without_a_file_is_given_as_resolved(fails, tmp_path, path):
    message = fails(3, *command(path))
    assert str(tmp_path / path) in message and f"working directory: {tmp_path}" in message


def test_a_last_line_that_breaks_off_says_the_file_may_be_incomplete(fails, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MANY)[:-9])
    message = fails(3, *command("rows.jsonl"))
    assert "rows.jsonl:20" in message and "may be incomplete" in message and SECRET not in message


def said(outcome):
    """What a command that goes well prints, its line breaks aside."""
    assert outcome.status == 0, outcome.err
    assert SECRET not in outcome.out + outcome.err
    return " ".join((outcome.out + outcome.err).split())


def test_bad_rows_can_be_skipped_up_to_a_number(ftcore, fails, rows):
    path = rows(*MANY, b"{", GOOD, b"[]", with_(prompt=None))
    skipping = command(path, "data.on_bad_row=skip")
    assert "3 bad rows skipped (rows.jsonl:21, rows.jsonl:23, rows.jsonl:24)" in said(ftcore(*skipping))
    message = fails(3, *skipping, "data.max_bad_rows=2")
    assert "rows.jsonl:24" in message and "bad row 3" in message and SECRET not in message


def test_a_column_that_is_nearly_ours_is_asked_about(ftcore, rows):
    path = rows(*(row | {"anwser": "x"} for row in MANY))
    assert "column 'anwser' is not used; did you mean 'answer'?" in said(ftcore(*command(path)))


def test_marks_line_ends_and_blank_lines_of_other_systems_are_accepted(ftcore, fails, tmp_path):
    lines = [json.dumps(row | {"prompt": row["prompt"] + "\u2028"}, ensure_ascii=False) for row in MANY]
    text = "\ufeff" + "\r\n\r\n".join(lines) + "\r\n"
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    assert "20 train" in said(ftcore(*command("rows.jsonl", "data.test_share=0")))
    (tmp_path / "rows.jsonl").write_bytes(text.encode() + b"{\r\n")
    assert "rows.jsonl:40" in fails(3, *command("rows.jsonl"))


def test_long_rows_are_cut_or_left_out_and_counted(ftcore, rows):
    long = with_(completion=f"{SECRET} " * 200)
    path = rows(*MANY, long)
    for policy, word in (("truncate", "truncated"), ("drop", "dropped")):
        text = said(ftcore(*command(path, f"data.too_long={policy}", "data.max_length=64", "data.test_share=0")))
        assert f"1 {word} (data.max_length=64)" in text


def test_rows_cut_before_their_answer_are_counted_and_too_many_are_an_error(ftcore, fails, rows):
    lost = [with_(prompt=f"{SECRET} {k} " * 60) for k in range(2)]
    words = ["data.too_long=truncate", "data.max_length=64", "data.test_share=0"]
    assert "1 left without a trained token" in said(ftcore(*command(rows(*MANY, lost[0]), *words)))
    for path, count in ((rows(*MANY, *lost), "2 of 22"), (rows(*lost, name="lost.jsonl"), "2 of 2")):
        message = fails(3, *command(path, *words))
        assert f"{count} training rows are left without a trained token" in message and SECRET not in message


def test_a_bad_row_says_how_to_go_on_without_it(rows):
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .* data\.on_bad_row=skip leaves such rows out"):
        data(path=rows(GOOD, {**GOOD, "completion": None})).load("prompt_completion")


def test_a_folder_without_a_usable_row_is_named_by_its_files(rows):
    files = [rows({"text": "Some."}, name=f"{name}-00000-of-00001.jsonl") for name in ("train", "test")]
    with pytest.raises(DataError, match=r"/train-00000-of-00001\.jsonl: no row can be used.*self_supervised trains"):
        data(path=str(files[0].rpartition("/")[0]), on_bad_row="skip").load("prompt_completion")


@pytest.mark.parametrize("longest", [64, 4096])
def test_what_sets_the_longest_length_is_said(fails, rows, longest):
    long = {"prompt": f"{SECRET} " * 600, "completion": "Yes."}
    path = rows(*({**long, "id": k} for k in range(8)))
    words = command(
        path, f"data.max_length={longest}", "data.too_long=truncate", "data.duplicates=keep", "data.leakage=allow"
    )
    message = fails(3, *words)
    limit, advice = (
        ("data.max_length=64", "Raise data.max_length.") if longest == 64 else ("has room for 512", "more room.")
    )
    assert limit in message and advice in message and "data.max_lost" not in message
    assert limit in fails(3, "inspect", *words)
    assert limit in fails(3, *command(path, f"data.max_length={longest}", "data.too_long=drop", "data.leakage=allow"))


def test_turns_that_are_all_switched_off_are_told_so(fails, rows):
    turns = [
        [{"role": "user", "content": f"{SECRET} {k}"}, {"role": "assistant", "content": "b", "weight": 0}]
        for k in range(3)
    ]
    words = command(rows(*({"messages": messages} for messages in turns)))
    for verb in ([], ["inspect"]):
        assert "rows are without a turn that is trained: each of the assistant's turns" in fails(3, *verb, *words)


@pytest.mark.parametrize("form", ["texts", "conversations"])
def test_pairs_of_equal_answers_are_counted_and_too_many_are_an_error(rows, form):
    def pair(k, equal):
        answers = [f"yes {k}", f"yes {k}" if equal else f"no {k}"]
        row = {"prompt": f"Is it {k}?", "chosen": answers[0], "rejected": answers[1]}
        if form == "conversations":
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            row |= {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        return row

    few = rows(*(pair(k, k < 2) for k in range(40)), name="few.jsonl")
    assert any("2 pairs have two equal answers" in note for note in data(path=few).load("preference").notes)
    with pytest.raises(DataError, match=r"many\.jsonl:1: chosen equals rejected, as in 3 of 40 rows") as error:
        data(path=rows(*(pair(k, k < 3) for k in range(40)), name="many.jsonl")).load("preference")
    assert "data.max_lost" in str(error.value)


def test_repeated_rows_are_counted_and_can_be_dropped(ftcore, rows):
    path = rows(*MANY, MANY[0], MANY[1] | {"prompt": MANY[1]["prompt"].upper()})
    kept = said(ftcore(*command(path, "data.test_share=0")))
    assert "2 training rows repeat another" in kept and "rows.jsonl:21" in kept and "22 train" in kept
    assert "20 train" in said(ftcore(*command(path, "data.test_share=0", "data.duplicates=drop")))


@pytest.mark.parametrize("question", [MANY[3]["prompt"], MANY[3]["prompt"].upper().replace("?", " ?!")])
def test_a_held_out_question_that_is_trained_on_is_an_error(ftcore, fails, rows, question):
    held_out = rows({"prompt": question, "completion": "x"}, name="test.jsonl")
    words = command(rows(*MANY), f"data.splits.test={held_out}")
    message = fails(3, *words)
    assert "test.jsonl:1" in message and "rows.jsonl:4" in message and SECRET not in message
    said(ftcore(*words, "data.leakage=allow"))


def test_a_chat_template_that_is_missing_is_asked_for_with_the_options(fails, rows):
    path = rows(*turns(*("user", "assistant") * 2))
    message = fails(3, *command(path, "data.chat=false", "data.test_share=0"))
    assert "model.chat_template=<file.jinja>" in message and "ftcore://chatml.jinja" in message


def test_text_that_spells_a_control_token_is_counted(ftcore, rows):
    path = rows(*MANY, with_(prompt="Say <|im_end|> or <|endoftext|>."))
    assert "1 rows spell one; it stays text" in said(ftcore(*command(path, "data.test_share=0")))


def test_rows_that_changed_since_a_run_stopped_are_not_gone_on_with(ftcore, fails, rows, monkeypatch):
    words = [word for word in command(rows(*MANY), "checkpoints.every=1", "max_steps=5") if word != "dry_run=true"]
    monkeypatch.setenv("FTCORE_FAULTS", "raise step=3")
    with pytest.raises(RuntimeError, match="asked for"):
        ftcore(*words)
    monkeypatch.delenv("FTCORE_FAULTS")
    rows(*MANY[:-1], MANY[-1] | {"completion": f"{SECRET}!"})
    message = fails(3, *words, "resume=auto")
    assert "rows have changed since" in message and "step-00000002" in message and SECRET not in message
