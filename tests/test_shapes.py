"""Rows of other people's formats: what the model should see, or how it counts, is used, or the row is refused."""

import json

import pytest
from transformers import AutoTokenizer

from dev.shapes_table import PAGE, written
from ftcore.data.tokens import Encoder
from ftcore.errors import DataError
from ftcore.files import PACKAGE
from tests.test_data import data

ASKED, ANSWERED = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}
BAD = {"role": "assistant", "content": "Nowhere."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "find", "arguments": '{"form": 1}'}}],
}
RESULT = {"role": "tool", "content": "drawer 9"}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
HUMAN = "\n\nHuman: Where?\n\nAssistant:"


@pytest.fixture
def read(tmp_path):
    """The records of some rows."""

    def load(*rows, kind="prompt_completion", **changes):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return data(str(tmp_path / "rows.jsonl"), test_share=0.0, **changes).load(kind)

    return load


@pytest.fixture(scope="module")
def encoder():
    return Encoder(AutoTokenizer.from_pretrained(PACKAGE / "datasets/tiny"), data())


def shown(encoder, row):
    """A row as the model reads it, what trains between # and #."""
    (example,) = encoder.prompt_completions([row])
    text, trained = "", False
    for token, on in zip(example.input_ids, example.completion_mask, strict=True):
        text += "#" * (on != trained) + encoder.tokenizer.decode([token])
        trained = on
    return text.replace("<|im_start|>", "\n").replace("<|im_end|>", "").replace("\n\n", "\n").strip() + "#"


SEEN = {
    "a system column": ({"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}],
                         "system": "As a clerk."}, "system\nAs a clerk."),
    "a system column beside prompt and completion": (
        {"prompt": "Where?", "completion": "There.", "system": "As a clerk."}, "system\nAs a clerk."),
    "a history column": ({"instruction": "And now?", "input": "", "output": "There.", "history": [["Hello?", "Hi."]]},
                         "user\nHello?\nassistant\n#Hi.#\nuser\nAnd now?"),
    "a history of objects": (
        {"prompt": "And now?", "completion": "There.", "history": [{"query": "Hello?", "response": "Hi."}]},
        "user\nHello?\nassistant\n#Hi.#\nuser\nAnd now?"),
    "a history of messages": (
        {"instruction": "And now?", "output": "There.", "history": [{"role": "user", "content": "Hello?"}, ANSWERED]},
        "user\nHello?\nassistant\n#There.#\nuser\nAnd now?"),
    "tools as JSON text": ({"messages": [ASKED, CALL, RESULT, ANSWERED], "tools": json.dumps(TOOLS)}, '"name": "find"'),
    "functions": ({"messages": [ASKED, ANSWERED], "functions": [{"name": "find"}]}, '{"name": "find"}'),
    "the developer's message": (
        {"messages": [{"role": "developer", "content": "Be short."}, ASKED, ANSWERED]}, "system\nBe short."),
    "parts of text": (
        {"messages": [{**ASKED, "content": [{"type": "text", "text": "Where"}, {"type": "text", "text": "?"}]}, ANSWERED]},
        "user\nWhere?\n"),
    "a thought": ({"messages": [ASKED, {**ANSWERED, "reasoning_content": "Look."}]}, "#<think>\nLook.\n</think>\nThere.#"),
    "a call": ({"messages": [ASKED, CALL, RESULT, ANSWERED]},
               '#<tool_call>\n{"name": "find", "arguments": {"form": 1}}\n</tool_call>#\ntool\ndrawer 9\nassistant\n#There.#'),
    "a call of ShareGPT": ({"conversations": [
        {"from": "human", "value": "Where?"}, {"from": "function_call", "value": '{"name": "find", "arguments": {"form": 1}}'},
        {"from": "observation", "value": "drawer 9"}, {"from": "gpt", "value": "There."}]}, "</tool_call>#\ntool\ndrawer 9"),
    "role and content under ShareGPT's name": ({"conversations": [ASKED, ANSWERED]}, "user\nWhere?\nassistant\n#There.#"),
    "from and value under OpenAI's name": (
        {"messages": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]},
        "user\nWhere?\nassistant\n#There.#"),
    "a prompt of messages": ({"prompt": [ASKED], "completion": [ANSWERED]}, "user\nWhere?\nassistant\n#There.#"),
    "a prompt of messages and a text": ({"prompt": [ASKED], "completion": "There."}, "user\nWhere?\nassistant\n#There.#"),
    "a transcript": ({"prompt": HUMAN, "completion": " There."}, "user\nWhere?\nassistant\n#There.#"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SEEN)
def test_what_belongs_to_the_conversation_is_seen(read, encoder, kind):
    row, text = SEEN[kind]
    (found,) = read(row).train
    assert text in shown(encoder, found)


OFF = [{"weight": 0}, {"train": False}, {"training": "false"}, {"masked": True}, {"loss": 0.0}, {"loss_weight": 0.0}]


@pytest.mark.parametrize("off", OFF, ids=str)
def test_a_turn_that_is_switched_off_has_no_loss(read, encoder, off):
    (row,) = read({"messages": [ASKED, {**BAD, **off}, ASKED, {**ANSWERED, "weight": 1}]}).train
    assert shown(encoder, row) == "user\nWhere?\nassistant\nNowhere.\nuser\nWhere?\nassistant\n#There.#"


def test_a_row_that_is_switched_off_is_left_out_and_counted(read):
    rows = [{"prompt": f"Where is {k}?", "completion": "There.", "weight": k % 2} for k in range(6)]
    records = read(*rows)
    assert len(records.train) == 3 and "3 rows left out: they are switched off (weight)" in records.notes


PAIRS = {
    "messages": {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, BAD]},
    "a text and messages": {"prompt": "Where?", "chosen": [ANSWERED], "rejected": [BAD]},
    "a text and the whole conversation": {"prompt": "Where?", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, BAD]},
    "messages and texts": {"prompt": [ASKED], "chosen": "There.", "rejected": "Nowhere."},
    "conversations and one message": {"conversations": [ASKED], "chosen": ANSWERED, "rejected": BAD},
    "OpenAI's": {"input": {"messages": [ASKED]}, "preferred_output": [ANSWERED], "non_preferred_output": [BAD]},
    "Alpaca's": {"instruction": "Where?", "input": "", "chosen": "There.", "rejected": "Nowhere."},
    "transcripts": {"chosen": f"{HUMAN} There.", "rejected": f"{HUMAN} Nowhere."},
}


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_read_in_every_usual_form(read, kind):
    (row,) = read(PAIRS[kind], kind="preference").train
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Where?", "There.", "Nowhere.")


@pytest.mark.parametrize("label", [True, 1, "true", "True", "1", 1.0])
def test_labels_are_read_in_every_usual_form(read, label):
    (row,) = read({"messages": [ASKED, ANSWERED], "label": label}, kind="unpaired").train
    assert row["label"] is True
    (row,) = read({"prompt": "Where?", "completion": "There.", "kto_tag": label}, kind="unpaired").train
    assert row["label"] is True


def test_values_of_a_column_can_be_named(read):
    row = {"prompt": "Where?", "completion": "There.", "label": "good"}
    (found,) = read(row, kind="unpaired", values={"label": {"good": True, "bad": False}}).train
    assert found["label"] is True
    (found,) = read({**row, "label": 1}, kind="unpaired", values={"label": {1: False, 2: True}}).train
    assert found["label"] is False


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("prompt_completion", {"messages": [ASKED, ANSWERED], "images": ["a.jpg"]}, "column 'images' holds"),
        ("prompt_completion", {"prompt": "Where?", "completion": "There.", "audio": "a.wav"}, "column 'audio' holds"),
        ("prompt_completion", {"messages": [{**ASKED, "content": [{"type": "image_url"}]}, ANSWERED]}, "message 1.* image_url"),
        ("prompt_completion", {"messages": [ASKED, {**ANSWERED, "weight": 0.5}]}, "message 2.*'weight' must be 0, 1"),
        ("prompt_completion", {"prompt": "Where?", "completion": "There.", "weight": 3}, "'weight' must be 0, 1"),
        ("prompt_completion", {"messages": [ASKED, {**CALL, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "message 2: a call must have a name and arguments"),
        ("prompt_completion", {"messages": [ASKED, ANSWERED], "tools": "look_up"}, "tools must be a list"),
        ("prompt_completion", {"messages": [ASKED, ANSWERED, BAD]}, "take turns"),
        ("prompt_completion", {"instruction": None, "output": "There."}, "is not the alpaca"),
        ("preference", {"chosen": [ASKED, ANSWERED], "rejected": [{**ASKED, "content": "When?"}, BAD]},
         "different conversations"),
        ("preference", {"prompt": [ASKED], "chosen": [BAD, ASKED, ANSWERED], "rejected": [ANSWERED, ASKED, BAD]},
         "different conversations"),
        ("preference", {"prompt": "Why?", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, BAD]}, "different conversations"),
        ("preference", {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, BAD, ASKED]},
         "rejected: .*take turns, and the assistant comes last"),
        ("preference", {"chosen": [ASKED, {**CALL, "content": "x"}], "rejected": [ASKED, BAD]}, "without calls or thoughts"),
        ("prompt_completion", {"prompt": "And?", "completion": "No.", "history": [{"one": "a", "two": "b"}]}, "item of"),
        ("prompt_completion", {"prompt": "And?", "completion": "No.", "history": ["ab"]}, "each item of 'history'"),
        ("prompt_completion", {"messages": [ASKED, {**ANSWERED, "content": [{"type": "text", "value": "x"}]}]},
         "message 2: its content has a part of the type text without a text in 'text'"),
        ("prompt_completion", {"conversation": [{"human": "Where?", "assistant": "There."}]},
         "message 1 does not say who speaks; its keys are 'human', 'assistant'"),
        ("preference", {"chosen": [ASKED, ANSWERED, ASKED, {**ANSWERED, "content": ""}], "rejected": [ASKED, BAD, ASKED, BAD]},
         "chosen: message 4 has no text"),
        ("preference", {"chosen": [ASKED, ANSWERED, ANSWERED], "rejected": [ASKED, BAD]}, "chosen: .*take turns"),
        ("prompt_completion", {"prompt": "Where?", "chosen": "There.", "rejected": "Nowhere."}, "method=dpo trains"),
        ("prompt_completion", {"text": "Over there."}, "method=self_supervised trains"),
        *(("prompt_completion", {"messages": [ASKED, {**ANSWERED, key: value}]}, f"message 2 has the key '{key}', which may hold")
          for key, value in [("thought", "Hm."), ("analysis", "Hm."), ("tool_plan", "Look."), ("learn", 0), ("loss_mask", 0)]),
        ("preference", {"chosen": [ASKED, {**ANSWERED, "tool_calls": [{"function": {"name": "f"}}]}, ASKED, ANSWERED],
                        "rejected": [ASKED, ANSWERED, ASKED, BAD]}, "different conversations"),
        ("preference", {"prompt": HUMAN, "chosen": " A.\n\nHuman: Why?\n\nAssistant: B.", "rejected": " C."}, "further turns"),
        ("prompt_completion", {"prompt": HUMAN, "completion": " A.\n\nHuman: Why?"}, "further turns"),
        ("preference", {"chosen": f"{HUMAN} A.\n\nAssistant: B.", "rejected": f"{HUMAN} A.\n\nAssistant: C."}, "take turns"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_the_reason(read, kind, row, reason):
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{reason}|rows.jsonl:1: {reason}"):
        read(row, kind=kind)


@pytest.mark.parametrize("wrong", ["label 5", "turns"])
def test_when_every_row_is_bad_the_reason_is_said_instead_of_an_empty_split(read, wrong):
    rows = [{"messages": [ASKED, ANSWERED, ANSWERED]}] * 3
    with pytest.raises(DataError, match=r"no row can be used. 3 x \(first rows.jsonl:1\) after at most one system"):
        read(*rows, on_bad_row="skip")


def test_reasons_that_differ_by_a_place_alone_are_counted_together(read):
    rows = [{"messages": [ASKED, ANSWERED] * k + [ASKED, {**ANSWERED, "content": ""}]} for k in range(3)]
    rows += [{"messages": [ASKED, ANSWERED] * k + [ASKED, ASKED]} for k in range(2)]
    with pytest.raises(DataError, match=r"no row can be used. 3 x .*; 2 x [^;]*; the roles are [^;]*$"):
        read(*rows, on_bad_row="skip", max_bad_rows=9)


def test_rows_that_are_all_switched_off_are_told_so(read):
    with pytest.raises(DataError, match=r"no row can be used. 2 rows left out: they are switched off \(weight\)"):
        read(*[{"prompt": "Where?", "completion": "There.", "weight": 0}] * 2)


def test_columns_that_are_not_used_are_listed_once(read):
    rows = [{"prompt": f"Where is {k}?", "completion": "There.", "score": 1, "split_name": "a"} for k in range(3)]
    assert read(*rows).notes == ("columns that are not used: score, split_name",)


def test_what_belongs_to_a_conversation_is_not_used_beside_a_plain_text(read):
    rows = [{"text": f"Where is {k}?", "system": "Be brief.", "tools": [{"name": "f"}]} for k in range(3)]
    assert read(*rows, kind="text").notes == ("columns that are not used: system, tools",)


def test_mapping_one_column_leaves_a_known_shape_known(read):
    (row,) = read({"instruction": "Where?", "input": "", "output": "There."}, columns={"answer": "output"}).train
    assert (row["prompt"], row["completion"], row["answer"]) == ("Where?", "There.", "There.")


def test_a_text_of_a_conversation_has_all_its_turns(read):
    (row,) = read({"messages": [ASKED, BAD, ASKED, ANSWERED]}, kind="text").train
    assert row["text"] == "Where?\nNowhere.\nWhere?\nThere."


def test_rows_that_share_an_id_are_told_apart_by_file_and_line(tmp_path):
    for name in "ab":
        lines = [{"id": k, "prompt": f"Where is {name}{k}?", "completion": "There."} for k in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = data(str(tmp_path), test_share=0.0).load("prompt_completion")
    assert [row["id"] for row in records.train] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]
    assert "4 rows share their id with another: they are named by file and line" in records.notes


def test_files_of_one_name_in_two_splits_are_told_apart(tmp_path):
    for k, part in enumerate(("one", "two")):
        (tmp_path / part).mkdir()
        line = {"prompt": f"Where is {k}?", "chosen": "There.", "rejected": "Nowhere."}
        (tmp_path / part / "rows.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "id": 7}) + "\n")
    splits = {"train": f"{tmp_path}/one/rows.jsonl", "test": f"{tmp_path}/two/rows.jsonl"}
    for kind in ("preference", "unpaired"):
        records = data(splits=splits).load(kind)
        rows = [*records.train, *records.test]
        assert len({row["id"] for row in rows}) == len(rows) == {"preference": 4, "unpaired": 8}[kind]
        assert (
            records.train[0]["where"] == "rows.jsonl:1" and records.test[0]["where"] == f"{tmp_path}/two/rows.jsonl:1"
        )


def test_pairs_that_share_an_id_give_good_and_bad_answers_with_ids_of_their_own(read):
    rows = [{"id": 7, "prompt": f"Where is {k}?", "chosen": "There.", "rejected": "Nowhere."} for k in range(2)]
    ids = [row["id"] for row in read(*rows, kind="unpaired").train]
    assert ids == ["rows.jsonl:1", "rows.jsonl:1/2", "rows.jsonl:2", "rows.jsonl:2/2"]


def test_a_template_names_file_and_line_of_a_row_without_its_column(read):
    rows = [{"question": "Where?", "right": "There."}, {"question": None, "right": "There."}]
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*'question', which holds null"):
        read(*rows, columns={"prompt": "Q: {question}", "completion": "right"})


def test_columns_of_a_template_are_used_and_only_texts_fill_it(read):
    row = {"question": "Where?", "hints": ["Look.", "Ask."], "right": "There."}
    filled = {"prompt": "{question} {hints}", "completion": "{right}"}
    records = read(row, columns=filled)
    assert records.train[0]["prompt"] == "Where? Look.\nAsk." and records.notes == ()
    with pytest.raises(DataError, match="'hints', which holds a list of more than texts"):
        read({**row, "hints": [{"hint": "Look."}]}, columns=filled)


def test_a_conversation_that_ends_with_a_question_is_a_prompt_to_answer(read):
    (row,) = read({"messages": [ASKED, BAD, {"role": "user", "content": "Sure?"}], "tools": TOOLS}, kind="prompt").train
    assert row["prompt"] == "Sure?" and "completion" not in row and row["tools"] == TOOLS
    (row,) = read({"messages": [ASKED, ANSWERED]}, kind="prompt").train
    assert row["completion"] == "There."


def test_a_text_of_a_conversation_has_its_tools(read):
    (row,) = read({"messages": [ASKED, ANSWERED], "tools": TOOLS}, kind="text").train
    assert row["text"].startswith('[{"type":"function"') and row["text"].endswith("Where?\nThere.")


def test_keys_of_messages_that_nothing_may_read_are_listed(read):
    notes = read({"messages": [{**ASKED, "lang": "en", "name": "Ann"}, ANSWERED]}).notes
    assert "keys of messages that only a chat template may read: lang" in notes


def test_a_local_copy_of_a_hub_set_has_its_columns_or_ours(read):
    hub = {"columns": {"prompt": "question", "completion": "answer"}, "values": {}, "splits": {"train": "x"}}
    theirs, ours = {"question": "Where?", "answer": "There."}, {"prompt": "Where?", "completion": "There."}
    for row in (theirs, ours):
        (found,) = read(row, hub=hub).train
        assert (found["prompt"], found["completion"]) == ("Where?", "There.")


def test_the_items_of_a_line_have_names_of_their_own(tmp_path):
    (tmp_path / "rows.json").write_text(
        json.dumps([{"prompt": f"Where is {k}?", "completion": "There."} for k in range(3)])
    )
    found = data(str(tmp_path / "rows.json"), test_share=0.0).load("prompt_completion").train
    assert [row["where"] for row in found] == ["rows.json:1", "rows.json:1, item 2", "rows.json:1, item 3"]
    assert len({row["id"] for row in found}) == 3


def test_the_table_in_the_docs_is_that_of_the_code():
    assert PAGE.read_text(encoding="utf-8") == written(), "run: make schema"
