"""Several sources as one."""

from collections import Counter
from pathlib import Path

import pytest

from ftcore.data.mixture import Mixture
from ftcore.errors import DataError
from tests.test_data import data


def mixture(**sources):
    shared = vars(data(test_share=0.0)).copy()
    full = {name: {"columns": {}, "weight": 1, "max_rows": None, **source} for name, source in sources.items()}
    return Mixture(**shared, sources=full).load("prompt_completion")


@pytest.fixture
def files(rows):
    def lines(word, n):
        return [{"prompt": f"{word} {k}", "completion": f"{word} answer {k}"} for k in range(n)]

    return rows(*lines("first", 20), name="a.jsonl"), rows(
        *({"question": r["prompt"], "answer_text": r["completion"]} for r in lines("second", 40)), name="b.jsonl"
    )


def test_sources_are_capped_and_repeated_and_keep_their_name(files):
    own, other = files
    mapped = {"path": other, "columns": {"prompt": "question", "completion": "answer_text"}, "max_rows": 10}
    records = mixture(own={"path": own, "weight": 2.5}, other=mapped)
    counts = Counter(row["source"] for row in records.train)
    assert counts["other"] == 10 and 40 < counts["own"] < 60
    assert len({row["id"] for row in records.train}) == len(records.train)
    assert records.notes[-2:] == (
        f"own: {counts['own']} train (20 different), 0 held out",
        "other: 10 train (10 different), 0 held out",
    )
    again = mixture(own={"path": own, "weight": 2.5}, other=mapped)
    assert again.content_hash == records.content_hash


def test_a_weight_below_one_takes_a_share(files):
    rows = mixture(own={"path": files[0], "weight": 0.5}).train
    assert 3 < len(rows) < 17


def test_all_sources_that_cannot_be_read_are_named_with_keys_that_fit(files, rows):
    other = rows({"frage": "a", "antwort": "b"}, name="c.jsonl")
    with pytest.raises(DataError) as error:
        mixture(own={"path": files[0]}, second={"path": files[1]}, third={"path": other})
    assert "own:" not in str(error.value)
    for name, path in (("second", files[1]), ("third", other)):
        assert f"{name}: {Path(path).name}:1" in str(error.value)
        assert f"data.sources.{name}.columns.prompt=" in str(error.value)


def test_a_mixture_of_nothing_says_how_to_name_sources():
    with pytest.raises(DataError, match=r"data.sources.<name>"):
        mixture()
