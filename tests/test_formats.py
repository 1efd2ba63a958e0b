"""Every format gives the same rows, and what is wrong in one is named with file and line, without a word of its content."""

import csv
import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from ftcore.config.build import build
from ftcore.config.compose import load_config
from ftcore.data import Data, json_array
from ftcore.data.sources import files_of, read_rows, rows_of
from ftcore.errors import DataError
from tests.test_data import data

ROWS = [{"prompt": f"secret {k}?", "completion": f'é, "{k}"\nand\u2028more'} for k in range(3)]


def written(path, rows, delimiter=","):
    """Rows in the format that the name says."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    if name.endswith(("csv", "tsv")):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if name.endswith("tsv") else ",")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    else:
        content = (
            json.dumps(rows, indent=1).encode()
            if name.endswith("json")
            else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        )
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pyarrow.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)


FORMATS = ["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "jsonl.zst", "csv.gz", "json.zst"]


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, ending):
    file = tmp_path / f"rows.{ending}"
    written(file, ROWS)
    assert [row for _, row in rows_of(str(file))] == ROWS
    records = data(str(file), test_share=0.0).load("prompt_completion")
    assert [row["completion"] for row in records.train] == [row["completion"] for row in ROWS]


def test_a_folder_or_a_pattern_is_all_its_files_by_name(tmp_path):
    for name in ("b/two.txt", "a.md", ".hidden.txt", "notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(rows_of(str(tmp_path))) == [("a.md:1", {"text": "a.md"}), ("b/two.txt:1", {"text": "b/two.txt"})]
    assert [where for where, _ in rows_of(str(tmp_path / "*" / "*.txt"))] == ["b/two.txt:1"]
    for path in (tmp_path / "*.csv", tmp_path / "none"):
        with pytest.raises(DataError, match=r"working directory"):
            files_of(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b'prompt,completion\nsecret,"a\nb"\nsecret,a,b\n', r"x.csv:4: 3 fields, and the header has 2"),
        ("x.csv", b'prompt,completion\nsecret,"secret\n', r"x.csv:2: not valid CSV: .*quote left open"),
        ("x.csv", b"prompt,prompt\nsecret,b\n", r"x.csv:1: the header names a column twice"),
        ("x.tsv", b"prompt\tcompletion\nsecret\t\xff\n", r"x.tsv:2: byte 8 is not UTF-8"),
        ("x.json", b'[{"prompt": "a"},\n\n{"prompt": "secret", ]', r"x.json:3: not valid JSON: .*incomplete"),
        ("x.json", b'[{"prompt": "a"},\n 5]', r"x.json:2: a row must be a JSON object, not a number"),
        ("x.json", b'"secret"', r"must hold an array of objects"),
        ("x.parquet", b"secret", r"x.parquet cannot be read as Parquet"),
        # mtime: the same name of the test in every process that collects it
        ("x.jsonl.gz", gzip.compress(b'{"prompt": "secret"}\n' * 99, mtime=0)[:-12], r"x.jsonl.gz cannot be unpacked"),
        ("x.jsonl.gz", b"secret", r"x.jsonl.gz cannot be unpacked"),
        ("x.jsonl.zst", b"secret", r"x.jsonl.zst cannot be unpacked"),
        ("x.xlsx", b"secret", r"the ending says no format"),
        ("x.txt", b" \n", r"x.txt has 0 rows"),
        ("x.csv", b"prompt,completion\n", r"x.csv has 0 rows"),
    ],
)
def test_a_broken_file_is_refused_with_file_line_and_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(rows_of(str(tmp_path / name)))
    assert "secret" not in str(error.value)


def test_bad_rows_are_skipped_and_counted_up_to_a_limit(rows):
    good = {"prompt": "question", "completion": "answer"}
    path = rows(good, b"{", {**good, "prompt": "other"}, {"prompt": 5, "completion": "x"})
    records = data(path, on_bad_row="skip", test_share=0.0).load("prompt_completion")
    assert [row["where"] for row in records.train] == ["rows.jsonl:1", "rows.jsonl:3"]
    total, *reasons = records.notes
    assert total == "2 bad rows skipped (rows.jsonl:2, rows.jsonl:4)"
    assert [reason[:24] for reason in reasons] == ["1 x (first rows.jsonl:2)", "1 x (first rows.jsonl:4)"]
    assert "not valid JSON" in reasons[0] and "'prompt' must be text, not int" in reasons[1]
    with pytest.raises(DataError, match=r"rows.jsonl:4.*bad row 2; data.max_bad_rows=1"):
        data(path, on_bad_row="skip", max_bad_rows=1).load("prompt_completion")
    assert [type(row) is dict for _, row in read_rows(path)] == [True, False, True, True]


def test_a_template_fills_a_column_from_others(rows):
    raw = {"question": "Which?", "options": ["one", "two"], "meta": {"place": "here"}, "right": "two"}
    columns = {"prompt": "{question} ({meta.place})\n{options}", "completion": "right"}
    (row,) = data(rows(raw), columns=columns, test_share=0.0).load("prompt_completion").train
    assert row["prompt"] == "Which? (here)\none\ntwo" and row["completion"] == "two"
    with pytest.raises(DataError, match=r"template names 'meta.nowhere'"):
        data(rows(raw), columns={**columns, "prompt": "{meta.nowhere}"}).load("prompt_completion")
    with pytest.raises(DataError, match=r"template names 'question.__class__'"):
        data(rows(raw), columns={**columns, "prompt": "{question.__class__}"}).load("prompt_completion")


SAID = [
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Well?"},
]
SIDES = (("chosen", "good"), ("rejected", "bad"))
SHAPES = {
    "alpaca": (
        {"instruction": "Say", "input": "it", "output": "yes"},
        "prompt_completion",
        {"prompt": "Say\n\nit", "completion": "yes"},
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Say"}, {"from": "gpt", "value": "yes"}]},
        "prompt_completion",
        {"prompt": "Say", "completion": "yes"},
    ),
    "pairs": (
        {"prompt": "Well?", **{side: [*SAID, {"role": "assistant", "content": says}] for side, says in SIDES}},
        "preference",
        {"prompt": "Well?", "chosen": "good", "rejected": "bad"},
    ),
    "transcripts": (
        {"chosen": "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: Well?\n\nAssistant: good",
         "rejected": "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: Well?\n\nAssistant: bad"},
        "preference",
        {"prompt": "Well?", "chosen": "good", "rejected": "bad"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_others_are_recognised_and_said(rows, name):
    raw, kind, expected = SHAPES[name]
    records = data(rows(raw), test_share=0.0).load(kind)
    assert {key: records.train[0][key] for key in expected} == expected
    assert name in records.notes[0]
    if kind == "preference":
        assert [message["content"] for message in records.train[0]["messages"][:3]] == ["Hello?", "Hi.", "Well?"]


def test_a_column_that_looks_misspelt_is_said_once(rows):
    lines = [{"prompt": f"q{k}", "completion": "a", "anwser": "b", "source": "c"} for k in range(30)]
    notes = data(rows(*lines)).load("prompt_completion").notes
    assert notes == ("column 'anwser' is not used; did you mean 'answer'?",)


def test_a_set_of_the_hub_is_read_by_its_own_columns_at_one_commit(monkeypatch):
    asked = {}

    def load_dataset(name, config, **options):
        asked.update(options, name=name, config=config)
        return iter(
            [
                {
                    "question": f"Which {options['split']}, {k}?",
                    "opa": "x",
                    "opb": "y",
                    "opc": "z",
                    "opd": "w",
                    "cop": k % 4,
                }
                for k in range(20)
            ]
        )

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: SimpleNamespace(sha="abc"))
    records = build(load_config(["data=medmcqa"])["data"], Data).load("prompt_completion")
    assert asked == {
        "name": "openlifescienceai/medmcqa",
        "config": None,
        "split": "validation",
        "revision": "abc",
        "streaming": True,
    }
    assert records.train[1]["prompt"] == "Which train, 1?\nA. x\nB. y\nC. z\nD. w\nAnswer with the letter."
    assert [row["answer"] for row in records.train[:5]] == ["A", "B", "C", "D", "A"]


def test_a_hub_that_does_not_answer_is_an_error_that_names_the_ways_out(fails, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    message = fails(3, "data=gsm8k", "model=tiny", "logger=none")
    assert all(part in message for part in ("openai/gsm8k", "no network", "data.path=<file>"))


# Files that hold more, or something else, than they seem to.


def read_all(file):
    return list(read_rows(str(file)))


@pytest.mark.parametrize("end", ['[{"prompt": "x"}]', '{"prompt": "x"}', "garbage", "]"])
def test_nothing_after_the_end_of_an_array_is_lost(tmp_path, end):
    (tmp_path / "rows.json").write_text('[{"prompt": "a"},\n {"prompt": "b"}]\n' + end)
    with pytest.raises(DataError, match=r"rows.json:3: something follows the array"):
        read_all(tmp_path / "rows.json")


@pytest.mark.parametrize("text", ['[{"a": "b"} {"a": "c"}]', '[{"a": "b"}, {"a": "c"}', '[{"a": "b"},]x'])
def test_an_array_without_its_commas_or_end_is_refused(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=r"rows.json:1: (not valid JSON|something follows)"):
        read_all(tmp_path / "rows.json")


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_in_pieces_wherever_they_end(tmp_path, monkeypatch, chunk, indent):
    rows = [{"prompt": 'é 骨 \U0001f9b4 \n \\ "', "n": [1.5e3, -20, True, None, {"a": []}]}, {"prompt": "b"}] * 3
    monkeypatch.setattr(json_array, "CHUNK", chunk)
    for text in (json.dumps(rows, indent=indent), json.dumps(rows, indent=indent, ensure_ascii=False)):
        (tmp_path / "rows.json").write_text("\ufeff" + text + "\n", encoding="utf-8")
        assert [row for _, row in read_all(tmp_path / "rows.json")] == rows
        lines = [int(place.split(":")[1].split(",")[0]) for place, _ in read_all(tmp_path / "rows.json")]
        assert (
            lines == [k + 1 for k, line in enumerate(text.split("\n")) if indent and line == " {"] or lines == [1] * 6
        )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'[{"a": "b"},\n{"a": tru}]', "rows.json:2: not valid JSON: Expecting value"),
        (b'[{"a": "b"},\n{"a": "b]', "rows.json:2: not valid JSON: Unterminated string"),
        (b'[{"a": "b"},\n\n{"a": "\xff"}]', "rows.json:3: a byte is not UTF-8"),
        (b'[{"a": "b"}\n' + b" " * 100 + b"x", "rows.json:2: not valid JSON: no comma"),
        (b'[\n{"a": "' + b"b" * 3_000_000 + b'"}]', "rows.json:2: not valid JSON: the item has more than 1 MB"),
        (b"[" * 100_000, "rows.json:1: not valid JSON: maximum recursion depth"),
    ],
)
def test_what_is_wrong_in_an_array_is_told_with_its_line(tmp_path, monkeypatch, text, reason):
    monkeypatch.setattr(json_array, "CHUNK", 50)
    (tmp_path / "rows.json").write_bytes(text)
    with pytest.raises(DataError, match=reason):
        list(read_rows(str(tmp_path / "rows.json"), longest=1))


def test_a_long_array_takes_the_memory_of_its_items(tmp_path):
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps([{"prompt": "a" * 1000}] * 20_000).encode()))
    tracemalloc.start()
    assert sum(1 for _ in read_rows(str(tmp_path / "rows.json.gz"))) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20  # the text has 20 MB


@pytest.mark.parametrize(
    "row",
    [
        '{"a": "1", "a": "2"}',
        '{"a": "1", "a" : "2"}',
        '{"a": "1", "a" \t : "2"}',
        '{"a": {"b": 1, "b": 2}}',
        '{"a": [{"b": 1, "b": 2}]}',
        '{"a": 1e999}',
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_key_given_twice_and_an_infinite_number_are_refused(tmp_path, row, ending):
    file = tmp_path / f"rows.{ending}"
    file.write_text(f"{row}\n" if ending == "jsonl" else f"[{row}]")
    with pytest.raises(DataError, match="a key is given twice in one object|a number is too large"):
        for _, found in read_all(file):
            if isinstance(found, DataError):
                raise found


@pytest.mark.parametrize("row", [{"a": 'he said "x": y'}, {"a": {"b": "c"}, "d": [{"e": 1}]}, {'a"': "b"}])
def test_a_row_that_only_looks_as_if_a_key_came_twice_is_read(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert read_all(tmp_path / "rows.jsonl") == [("rows.jsonl:1", row)]


PLACEHOLDERS = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:44\nsize 2\n",
    "a git-annex pointer": b"/annex/objects/SHA256E-s242644--44.jsonl\n",
    "a web page": b"<!DOCTYPE html>\n<html><body>404</body></html>",
    "a .zip file": b"PK\x03\x04" + bytes(40),
    "a .gz file": gzip.compress(b'{"prompt": "a"}\n'),
    "a .parquet file": b"PAR1" + bytes(40),
    "UTF-16": '{"prompt": "a"}\n'.encode("utf-16"),
    "UTF-16.": '{"prompt": "a"}\n'.encode("utf-16-le"),
    "UTF-16..": '{"prompt": "a"}\n'.encode("utf-16-be"),
    "or UTF-32": '{"prompt": "a"}\n'.encode("utf-32"),
    "or UTF-32.": '{"prompt": "a"}\n'.encode("utf-32-be"),
}


@pytest.mark.parametrize("kind", PLACEHOLDERS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_a_file_that_is_something_else_is_named_as_what_it_is(tmp_path, kind, name):
    (tmp_path / name).write_bytes(PLACEHOLDERS[kind])
    with pytest.raises(DataError, match=kind.rstrip(".")):
        read_all(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_a_damaged_or_missing_archive_is_an_error_of_ours(tmp_path, name):
    (tmp_path / name).write_bytes(PLACEHOLDERS["a Git LFS pointer"])
    with pytest.raises(DataError, match="a Git LFS pointer"):
        read_all(tmp_path / name)
    packed = bytearray(gzip.compress(b'{"prompt": "a"}\n' * 100))
    packed[20] ^= 255
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(DataError, match=r"cannot be|is a .gz file"):
        read_all(tmp_path / name)


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="a column is there twice"):
        read_all(tmp_path / "rows.parquet")


def test_a_pointer_within_an_archive_and_a_link_to_nothing_are_named(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(PLACEHOLDERS["a Git LFS pointer"]))
    with pytest.raises(DataError, match="holds a Git LFS pointer"):
        read_all(tmp_path / "rows.jsonl.gz")
    (tmp_path / "other.jsonl").symlink_to("../.git/annex/objects/x.jsonl")
    for path in (tmp_path, tmp_path / "other.jsonl"):
        with pytest.raises(DataError, match="other.jsonl is a link to a file that is not here"):
            read_all(path)


def test_a_line_without_end_is_refused_in_little_memory(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "' + b"a" * 3_000_000))
    with pytest.raises(DataError, match=r"rows.jsonl.gz:1: the line has more than 1 MB. Raise data.max_line_mb"):
        list(read_rows(str(tmp_path / "rows.jsonl.gz"), 1))


@pytest.mark.parametrize(
    "text",
    [",prompt,completion\n0,a,b\n", "prompt,completion,\na,b,\n", "prompt;completion\na;b\n", "prompt\tcompletion\na\tb\n",
     "sep=;\nprompt;completion\na;b\n", "\ufeffprompt;completion\r\n\"a\";b\r\n"],
)  # fmt: skip
def test_csv_as_pandas_and_spreadsheets_write_it(tmp_path, text):
    (tmp_path / "rows.csv").write_text(text)
    records = data(str(tmp_path / "rows.csv"), test_share=0.0).load("prompt_completion")
    assert [(row["prompt"], row["completion"]) for row in records.train] == [("a", "b")]
    unnamed = ["columns that are not used: one without a name"] * (text[0] == "," or ",\n" in text)
    assert list(records.notes) == unnamed


@pytest.mark.parametrize(
    "first", ["secret question " * 9 + ",secret?", "My secret arm hurts,Rest", "It is secret.,yes", "7,secret"]
)
def test_a_file_without_a_header_does_not_show_its_first_row(tmp_path, first):
    (tmp_path / "rows.csv").write_text(f"{first}\nb,c\n")
    with pytest.raises(DataError, match="no column 'prompt'; the row has 2 whose names are not shown") as error:
        data(str(tmp_path / "rows.csv")).load("prompt_completion")
    assert len(str(error.value)) < 500


def test_private_rows_show_the_names_of_columns_that_mean_something_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("FTCORE_PRIVATE", "1")
    (tmp_path / "rows.csv").write_text("Smith,label,answer\na,b,c\n")
    with pytest.raises(DataError, match="the row has label and 2 whose names are not shown"):
        data(str(tmp_path / "rows.csv")).load("prompt_completion")


SPLIT_NAMES = {
    "shards of the hub": (
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"],
        (2, 0, 1),
    ),
    "parts": (["train.part1.jsonl", "train_2.jsonl", "dev.jsonl"], (2, 1, 0)),
    "folders": (["train/a.jsonl", "train/b.jsonl", "valid/a.jsonl", "evaluation/c.jsonl"], (2, 1, 1)),
    "a folder above": (["data/training-0.jsonl", "data/val-0.jsonl"], (1, 1, 0)),
    "rows of no split beside a test": (["rows.jsonl", "testing.jsonl"], (1, 0, 1)),
    "words that only hold a split's name": (["latest.jsonl", "trained.jsonl", "develop.jsonl"], (3, 0, 0)),
    "one split": (["train-0.jsonl", "train-1.jsonl"], (2, 0, 0)),
    "one word of two": (["TrainData.jsonl", "myTestset.jsonl", "valset.jsonl", "dataset.jsonl"], (1, 1, 1)),
}


@pytest.mark.parametrize("kind", SPLIT_NAMES)
def test_files_belong_to_the_split_that_their_names_say(tmp_path, kind):
    names, counts = SPLIT_NAMES[kind]
    for k, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": f"Where is {k}?", "completion": "There."}) + "\n")
    for path in (tmp_path, tmp_path / "**/*.jsonl"):
        found = data(str(path), test_share=0.0).load("prompt_completion")
        assert (len(found.train), len(found.validation), len(found.test)) == counts


def test_a_file_whose_name_is_no_text_is_read(tmp_path):
    Path(os.fsdecode(bytes(tmp_path) + b"/a\xff.jsonl")).write_text('{"prompt": "Where?", "completion": "There."}\n')
    assert [where for where, _ in read_all(tmp_path)] == ["a\ufffd.jsonl:1"]


def test_a_folder_of_held_out_rows_alone_trains_with_a_word(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"prompt": "Where?", "completion": "There."}\n')
    records = data(str(tmp_path), test_share=0.0).load("prompt_completion")
    assert len(records.train) == 1
    assert any("by their names all its files are held-out rows (test.jsonl)" in note for note in records.notes)


def test_cards_and_licences_are_no_rows_and_what_is_left_out_is_named(tmp_path):
    for name in ("README.md", "LICENSE.txt", "dataset_info.json", "notes.md", "scan.pdf"):
        (tmp_path / name).write_text("# A card")
    for k, name in enumerate(("train-0.jsonl", "test-0.jsonl")):
        (tmp_path / name).write_text(json.dumps({"prompt": f"Where is {k}?", "completion": "There."}) + "\n")
    notes = data(str(tmp_path)).load("prompt_completion").notes
    assert "its files train (1), test (1) are the splits" in notes[0]
    assert "5 files are not read (LICENSE.txt, README.md, dataset_info.json, notes.md, scan.pdf)" in notes[1]
