"""The rows of a step are a pure function of seed, epoch, position and lengths; the layout changes nothing but shapes."""

from itertools import chain

import numpy as np
import pytest

from ftcore.data.examples import Example
from ftcore.data.layouts import pad
from ftcore.data.steps import TrainBatches, steps_of_epoch

RANDOM = np.random.default_rng(0)
EXAMPLES = [
    Example(f"row-{k}", list(range(n)), [False] + [True] * (n - 1)) for k, n in enumerate(RANDOM.integers(3, 40, 101))
]
GENERAL = [Example(f"general-{k}", list(range(9)), [False] + [True] * 8) for k in range(5)]


def joined(lists):
    return list(chain.from_iterable(lists))


def tokens(example):
    return {"tokens": sum(example.completion_mask[1:])}


def batches(micro=8, world=1, rank=0, **changes):
    fields = {
        "examples": EXAMPLES, "collate": lambda rows: pad(rows, 0), "counts": tokens,
        "collate_text": lambda texts: pad(texts, 0), "retention_rows": 1, "retention_every": 1, "steps": 9,
        "global_batch_size": 16, "micro_batch_size": micro, "seed": 3, "rank": rank, "world_size": world,
    }  # fmt: skip
    return TrainBatches(**(fields | changes))


def rows_of_steps(micro, world):
    per_rank = [list(batches(micro, world, rank)) for rank in range(world)]
    size = batches(micro, world).accumulation
    steps = [[b for part in per_rank for b in part[k : k + size]] for k in range(0, len(per_rank[0]), size)]
    return [sorted(name for batch in step for name in batch["ids"]) for step in steps], steps


def test_every_row_is_seen_once_an_epoch_and_no_step_is_small():
    steps = steps_of_epoch([len(e.input_ids) for e in EXAMPLES], 16, seed=3, epoch=0)
    assert sorted(np.concatenate(steps)) == list(range(101))
    assert {len(step) for step in steps} == {14, 15}


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    lengths = [len(e.input_ids) for e in EXAMPLES]

    def order(seed, epoch):
        return [list(step) for step in steps_of_epoch(lengths, 16, seed, epoch)]

    np.random.seed(7)
    assert order(1, 0) == order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_rows_and_counts_of_a_step_do_not_depend_on_the_split():
    reference, steps = rows_of_steps(16, 1)
    for micro, world in [(8, 1), (1, 1), (8, 2), (2, 2), (4, 4)]:
        rows, split = rows_of_steps(micro, world)
        assert rows == reference
        for whole, parts in zip(steps, split, strict=True):
            assert all(part["counts"] == whole[0]["counts"] for part in parts)
            assert whole[0]["counts"]["tokens"] == sum(part["trained"].shape[1] for part in parts)


def test_rows_of_like_length_meet_so_that_little_is_padding():
    real = sum(int(b["attention_mask"].sum()) for b in batches())
    assert real / sum(b["input_ids"].numel() for b in batches()) > 0.85


def test_general_text_is_dealt_once_a_step_whatever_the_split():
    for micro, world, n in [(16, 1, 1), (1, 1, 3), (4, 2, 1), (2, 4, 3)]:
        _, steps = rows_of_steps(micro, world)
        per_rank = [list(batches(micro, world, r, retention=GENERAL, retention_rows=n)) for r in range(world)]
        size = len(per_rank[0]) // len(steps)
        first = [b for part in per_rank for b in part[:size]]
        assert sum(len(b["retention"]["ids"]) for b in first if "retention" in b) == n
        assert first[0]["counts"]["retention"] == 8 * n
        assert world == 1 or all("retention" in b for b in first)


def test_general_text_comes_every_so_many_steps_and_has_a_collation_of_its_own():
    changes = {"retention": GENERAL, "retention_every": 3, "collate_text": lambda rows: {"ids": [r.id for r in rows]}}
    steps = list(batches(micro=16, **changes))
    assert ["retention" in batch for batch in steps] == [True, False, False] * 3
    assert all(set(batch["retention"]) == {"ids"} for batch in steps if "retention" in batch)
    assert all(("retention" in batch) == (batch["counts"]["retention"] > 0) for batch in steps)


# What a method makes of a step's rows before it trains on them.


def prepared(world, updates, **changes):
    """What `prepare` saw in each process (rows drawn, a random number), and the rows of every batch."""
    seen, ids = [], []
    for rank in range(world):
        calls = []

        def prepare(draw, random, calls=calls):
            rows = draw()
            calls.append(([row.id for row in rows], random.random()))
            return rows

        ids.append([batch["ids"] for batch in batches(4, world, rank, prepare=prepare, updates=updates, **changes)])
        seen.append(calls)
    return seen, ids


@pytest.mark.parametrize("updates", [1, 3])
def test_rows_are_prepared_once_for_so_many_updates_alike_in_every_process(updates):
    seen, ids = prepared(world=2, updates=updates)
    assert seen[0] == seen[1] and len(seen[0]) == 9 // updates
    assert len({number for _, number in seen[0]}) == len(seen[0])  # new random numbers at every call
    per_step = [sorted(joined(part for rank in ids for part in rank[2 * k : 2 * k + 2])) for k in range(9)]
    assert per_step == [sorted(rows) for rows, _ in seen[0] for _ in range(updates)]


def test_what_is_prepared_takes_the_place_of_the_rows_and_is_counted():
    def halves(draw, _):
        return [Example(f"{row.id}/{k}", row.input_ids[:3], [False, True, True]) for row in draw() for k in range(2)]

    (step, *_) = batches(16, prepare=halves, rows_per_step=8)
    assert len(step["ids"]) == 2 * len({name.split("/")[0] for name in step["ids"]}) <= 16
    assert step["counts"]["tokens"] == 2 * len(step["ids"])


def test_a_step_draws_as_many_rows_as_it_is_told_and_every_row_once_an_epoch():
    drawn = [rows for rows, _ in prepared(world=1, updates=1, rows_per_step=4, steps=26)[0][0]]
    assert {len(rows) for rows in drawn} <= {3, 4} and sorted(joined(drawn)) == sorted(e.id for e in EXAMPLES)


def test_a_method_may_draw_again_until_it_has_enough():
    several = {"prepare": lambda draw, _: draw() + draw(), "rows_per_step": 4, "steps": 13}
    rows = joined(batch["ids"] for batch in batches(16, **several))
    assert sorted(rows) == sorted(example.id for example in EXAMPLES)
