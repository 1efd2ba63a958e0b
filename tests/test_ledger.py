"""The ledger: what each row's loss was, the same however rows share a batch."""

import pyarrow.parquet
import pytest

from ftcore.run_folder import Run
from ftcore.train.ledger import hardest
from tests.conftest import FAST

QUESTIONS = [{"prompt": f"What is {k} plus one?", "completion": f"{k + 1} " * (k + 1)} for k in range(4)]
PAIRS = [{"prompt": f"What is {k}?", "chosen": f"A number {k}.", "rejected": "No."} for k in range(4)]
ONE_EPOCH = ("max_epochs=1", "global_batch_size=4", "ledger=true", "retention.weight=0", "evaluate.enabled=false")


def ledger(folder) -> list[dict]:
    return pyarrow.parquet.read_table(folder / "ledger.parquet").to_pylist()


@pytest.mark.parametrize(
    ("made_of", "words"),
    [
        (QUESTIONS, ("method=sft",)),
        (QUESTIONS, ("method=sft", "method.packing=true")),
        (PAIRS, ("method=dpo",)),
        (PAIRS, ("method=orpo",)),
        (PAIRS, ("method=reward",)),
    ],
)
def test_a_rows_loss_does_not_depend_on_the_rows_beside_it(ftcore, rows, made_of, words):
    data = ("data=jsonl", f"data.path={rows(*made_of)}", "data.test_share=0", *words, *FAST, *ONE_EPOCH)
    together = ledger(ftcore(*data, "micro_batch_size=4").folder)
    alone = ledger(ftcore(*data, "micro_batch_size=1").folder)
    assert sorted(row["id"] for row in together) == [f"rows.jsonl:{k}" for k in range(1, 5)]
    losses = [{row["id"]: row["loss"] for row in found} for found in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_every_epoch_has_every_row_once_and_cut_rows_are_marked(ftcore, rows):
    path = rows(*QUESTIONS, {"prompt": "Say it.", "completion": "much " * 100})
    cut = ("data.test_share=0", "data.max_length=32", "data.too_long=truncate")
    words = ("data=jsonl", f"data.path={path}", *cut, *FAST, *ONE_EPOCH, "max_epochs=3", "hardware=ddp_2cpu")
    found = ledger(ftcore(*words).folder)
    for epoch in range(3):
        assert sorted(row["id"] for row in found if row["epoch"] == epoch) == [f"rows.jsonl:{k}" for k in range(1, 6)]
    assert {row["id"] for row in found if row["truncated"]} == {"rows.jsonl:5"}
    assert all(row["trained_tokens"] > 0 for row in found)


def test_inspect_shows_the_hardest_rows_of_a_run(ftcore, rows):
    words = ("data=jsonl", f"data.path={rows(*QUESTIONS)}", "data.test_share=0", *FAST, *ONE_EPOCH)
    run = ftcore(*words).folder
    first = max(ledger(run), key=lambda row: row["loss"])
    assert hardest(Run(run), 1)[0]["id"] == first["id"]
    out = ftcore("inspect", f"run={run}").out
    assert "highest loss" in out and out.rindex(first["id"]) > out.index("highest loss")
    without = ftcore(*words, "ledger=false").folder
    assert "ledger=true" in ftcore("inspect", f"run={without}").out
