"""The rows of a step are a pure function of seed, epoch, position and lengths; the layout changes nothing but shapes."""

import numpy as np

from ftcore.data.batches import TrainBatches, pad, steps_of_epoch
from ftcore.data.tokens import Example

RANDOM = np.random.default_rng(0)
EXAMPLES = [
    Example(f"row-{k}", list(range(n)), [False] + [True] * (n - 1)) for k, n in enumerate(RANDOM.integers(3, 40, 101))
]
GENERAL = [Example(f"general-{k}", list(range(9)), [False] + [True] * 8) for k in range(5)]


def batches(micro=8, world=1, rank=0, steps=9, retention=(), retention_rows=1):
    counts = lambda example: {"nll": sum(example.completion_mask[1:])}  # noqa: E731
    return TrainBatches(
        EXAMPLES, lambda rows: pad(rows, 0), counts, retention, retention_rows=retention_rows, retention_every=1, steps=steps,
        global_batch_size=16, micro_batch_size=micro, seed=3, rank=rank, world_size=world,
    )  # fmt: skip


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
            assert whole[0]["counts"]["nll"] == sum(int(part["completion_mask"][:, 1:].sum()) for part in parts)


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
