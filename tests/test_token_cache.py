"""Tokenised rows are kept by what they depend on and read back as they were."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

from ftcore.data import token_cache
from ftcore.data.examples import Example, Pair, Prompt
from ftcore.data.token_cache import Stored, lengths, stored
from ftcore.data.tokens import Encoder
from ftcore.errors import DataError, StorageError
from ftcore.files import PACKAGE
from ftcore.methods.kto import Labelled
from tests.test_data import data

ROWS = [
    {"id": str(k), "where": f"r.jsonl:{k}", "prompt": f"question {k} é", "completion": "word " * k, "chosen": "yes",
     "rejected": "no " * k}
    for k in range(1, 25)
]  # fmt: skip


@pytest.fixture
def encoder(monkeypatch, tmp_path):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path))
    monkeypatch.setattr(token_cache, "WORTH_KEEPING", 2)
    monkeypatch.setattr(token_cache, "CHUNK", 7)

    def make(**changes):
        tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "datasets" / "tiny")
        return Encoder(tokenizer, data(**{"too_long": "drop", "max_length": 40} | changes))

    return make


def labelled(encoder):
    return lambda rows: [
        Labelled(e.id, e.input_ids, e.completion_mask, good=len(e) % 2 == 0) for e in encoder.prompt_completions(rows)
    ]


KINDS = {
    "prompt_completions": (lambda encoder: encoder.prompt_completions, Example),
    "pairs": (lambda encoder: encoder.pairs, Pair),
    "prompts": (lambda encoder: encoder.prompts, Prompt),
    "labelled": (labelled, Labelled),
}


@pytest.mark.parametrize("name", KINDS)
def test_examples_come_back_as_they_were_with_what_was_dropped(encoder, name):
    make, kind = KINDS[name]
    plain, kept = encoder(), encoder()
    expected = make(plain)(ROWS)
    found = stored(ROWS, make(kept), kept, {})
    assert isinstance(found, Stored) and list(found) == expected and isinstance(found[0], kind)
    assert kept.counts == plain.counts and lengths(found) == [len(example) for example in expected]
    again = encoder()
    assert list(stored(ROWS, make(again), again, {})) == expected and again.counts == plain.counts


def test_targets_and_empty_answers_come_back(encoder):
    examples = [Example("a", [1, 2], [False, True], [3, 4]), Example("b", [], [], None), Example("é", [5], [True], [])]
    found = stored(ROWS, lambda rows: examples if len(rows) == token_cache.CHUNK else [], encoder(), {})
    assert list(found) == examples * (len(ROWS) // token_cache.CHUNK)


def test_what_they_depend_on_makes_them_anew_and_nothing_else_does(encoder, tmp_path):
    def folders(rows=ROWS, settings=None, **changes):
        made = encoder(**changes)
        stored(rows, made.prompt_completions, made, settings)
        return len([folder for folder in (tmp_path / "rows").iterdir() if folder.is_dir()])

    assert [folders(), folders(), folders(test_share=0.5)] == [1, 1, 1]
    assert folders(max_length=39) == 2 and folders(settings={"share": 0.5}) == 3
    assert folders(rows=[{**ROWS[0], "completion": "x"}, *ROWS[1:]]) == 4


def test_of_two_that_start_together_one_writes_and_both_read(encoder, tmp_path):
    expected, calls = encoder().prompt_completions(ROWS), []

    def work(made):
        def encode(rows):
            calls.append(len(rows))
            time.sleep(0.02)
            return made.prompt_completions(rows)

        return list(stored(ROWS, encode, made, {}))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, [encoder(), encoder()])) == [expected] * 2
    assert sum(calls) == len(ROWS) + 2 * token_cache.CHUNK  # each looks at the first rows, one encodes them all


def test_many_rows_are_shared_out_and_come_back_the_same(encoder, monkeypatch):
    plain, kept = encoder(), encoder()
    monkeypatch.setattr(token_cache, "ROWS_OF_A_WORKER", 8)
    monkeypatch.setattr(token_cache.os, "sched_getaffinity", lambda _: range(3))
    assert list(stored(ROWS, kept.pairs, kept, {})) == plain.pairs(ROWS) and kept.counts == plain.counts


def other_columns(folder):
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes().replace(b"input_ids", b"input_idz"))


DAMAGE = {
    "cut": lambda folder: os.truncate(folder / "2-of-3.arrow", (folder / "2-of-3.arrow").stat().st_size - 100),
    "empty": lambda folder: os.truncate(folder / "2-of-3.arrow", 0),
    "missing": lambda folder: (folder / "2-of-3.arrow").unlink(),
    "other columns": other_columns,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_named(encoder, monkeypatch, tmp_path, name):
    made = encoder()
    monkeypatch.setattr(token_cache, "ROWS_OF_A_WORKER", 8)
    monkeypatch.setattr(token_cache.os, "sched_getaffinity", lambda _: range(3))
    stored(ROWS, made.prompt_completions, made, {})
    (folder,) = [path for path in (tmp_path / "rows").iterdir() if path.is_dir()]
    DAMAGE[name](folder)
    with pytest.raises(StorageError, match=f"^{folder} is damaged. Delete it; its rows will be tokenised again.$"):
        stored(ROWS, made.prompt_completions, made, {})


def test_a_wrong_row_is_named_whoever_tokenises_it(encoder, monkeypatch):
    made = encoder(too_long="error", max_length=44)
    monkeypatch.setattr(token_cache, "ROWS_OF_A_WORKER", 8)
    monkeypatch.setattr(token_cache.os, "sched_getaffinity", lambda _: range(3))
    with pytest.raises(DataError, match=r"r.jsonl:2\d: \d+ tokens, data.max_length is 44"):
        stored(ROWS, made.prompt_completions, made, {})
