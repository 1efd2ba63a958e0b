"""Tokenised rows are kept by what they depend on and read back as they were."""

import pytest
from transformers import AutoTokenizer

from ftcore.data import store
from ftcore.data.store import Stored, lengths, stored
from ftcore.data.tokens import Encoder, Example, Pair, Prompt
from ftcore.methods.kto import Labelled
from ftcore.resources import PACKAGE
from tests.test_data import data

ROWS = [
    {"id": str(k), "where": f"r.jsonl:{k}", "prompt": f"question {k} é", "completion": "word " * k, "chosen": "yes",
     "rejected": "no " * k}
    for k in range(1, 25)
]  # fmt: skip


@pytest.fixture
def encoder(monkeypatch, tmp_path):
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "WORTH_KEEPING", 2)
    monkeypatch.setattr(store, "CHUNK", 7)

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
    found = stored(ROWS, lambda rows: examples if len(rows) == store.CHUNK else [], encoder(), {})
    assert list(found) == examples * (len(ROWS) // store.CHUNK)


def test_what_they_depend_on_makes_them_anew_and_nothing_else_does(encoder, tmp_path):
    def folders(rows=ROWS, settings=None, **changes):
        made = encoder(**changes)
        stored(rows, made.prompt_completions, made, settings)
        return len(list((tmp_path / "rows").iterdir()))

    assert [folders(), folders(), folders(test_share=0.5)] == [1, 1, 1]
    assert folders(max_length=39) == 2 and folders(settings={"share": 0.5}) == 3
    assert folders(rows=[{**ROWS[0], "completion": "x"}, *ROWS[1:]]) == 4


def test_of_two_writers_the_first_ones_folder_stays(encoder, tmp_path):
    made, first = encoder(), []

    def encode(rows):
        if not first and len(list((tmp_path / "rows").glob("partial-*"))):
            first.append(1)  # another process finishes while this one writes
            other = encoder()
            stored(ROWS, other.prompt_completions, other, {})
        return made.prompt_completions(rows)

    assert list(stored(ROWS, encode, made, {})) == encoder().prompt_completions(ROWS)
    assert first and len(list((tmp_path / "rows").iterdir())) == 1
