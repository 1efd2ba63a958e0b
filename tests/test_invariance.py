"""One trajectory however the batch is split: losses per step within 1e-6 in float32, and no drift in the mean residual."""

import pytest

WORDS = ["model=tiny", "logger=none", "evaluate.enabled=false", "hardware=cpu", "max_steps=8", "method.lr=1e-2"]
WORDS += ["global_batch_size=8"]
RETENTION = ["retention.weight=0.5", "retention.rows=2", "retention.every=1"]


def losses(ftcore, *words):
    outcome = ftcore(*WORDS, *words)
    assert outcome.status == 0, outcome.err
    metrics = outcome.metrics
    assert [line["step"] for line in metrics] == list(range(1, 9))
    return [line["train/loss"] for line in metrics]


@pytest.mark.parametrize("terms", [["retention.weight=0"], RETENTION], ids=["one term", "two terms"])
def test_accumulation_and_processes_do_not_change_the_losses(ftcore, terms):
    whole = losses(ftcore, "micro_batch_size=8", *terms)
    assert whole[-1] < whole[0] - 0.05  # it does learn: otherwise equal losses would say nothing
    splits = [["micro_batch_size=1"], ["micro_batch_size=2"], ["micro_batch_size=4", "hardware=ddp_2cpu"]]
    for words in splits if terms == RETENTION else splits[:1]:
        residuals = [a - b for a, b in zip(losses(ftcore, *words, *terms), whole, strict=True)]
        assert max(map(abs, residuals)) < 1e-6 * max(whole), words
        assert abs(sum(residuals) / len(residuals)) < 1e-6, words


def test_the_same_seed_gives_the_same_run_to_the_bit_and_another_seed_does_not(ftcore):
    first, second = losses(ftcore, "micro_batch_size=8"), losses(ftcore, "micro_batch_size=8")
    assert first == second != losses(ftcore, "micro_batch_size=8", "seed=1")
