"""Intervals hold the true difference as often as they say, and a verdict says no more than its test."""

import io
import math
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from ftcore.data.examples import Example
from ftcore.evaluate import intervals
from ftcore.evaluate.by_row import terms_by_row
from ftcore.evaluate.intervals import AT_ONCE, interval, mcnemar
from ftcore.evaluate.tables import SCORES, comparison
from ftcore.methods.terms import Averages, Term


def by_row(sums, counts=None, exponential=False, rows="rows"):
    """A score of one term; without counts a mean."""
    sums = [float(number) for number in sums]
    counts = [1.0] * len(sums) if counts is None else [float(number) for number in counts]
    return {"rows": rows, "sums": [sums], "counts": [counts], "exponential": exponential}


def rights(rows, gained, lost):
    """Two models' right and wrong answers, where the second alone is right on `gained` rows and the first alone on `lost`."""
    first, second = [k >= rows - lost for k in range(rows)], [k < gained for k in range(rows)]
    return by_row(first), by_row(second)


def normal_rewards(random):
    before = random.normal(0, 3, 40)
    return by_row(before), by_row(before + random.normal(0.3, 1, 40)), 0.3


def skewed_rewards(random):
    before = random.normal(0, 3, 60)
    return by_row(before), by_row(before + random.exponential(1, 60)), 1.0


def losses_per_token(random):
    tokens = random.integers(1, 30, 60)
    before = tokens * 4 + random.normal(0, 1, 60) * np.sqrt(tokens)
    after = before - 0.2 * tokens + random.normal(0, 1, 60) * np.sqrt(tokens)
    return by_row(before, tokens), by_row(after, tokens), -0.2


def perplexities(random):
    before, after, truth = losses_per_token(random)
    mean = math.exp(sum(before["sums"][0]) / sum(before["counts"][0]))
    return (
        {**before, "exponential": True},
        {**after, "exponential": True},
        mean * math.expm1(truth),
    )  # the change relative to what was seen


def answers(random):
    kinds = random.choice(4, size=80, p=[0.4, 0.25, 0.1, 0.25])  # both wrong, gained, lost, both right
    return by_row(kinds >= 2), by_row((kinds == 1) | (kinds == 3)), 0.15


@pytest.mark.parametrize("world", [normal_rewards, skewed_rewards, losses_per_token, perplexities, answers])
def test_95_of_100_intervals_hold_the_true_difference(monkeypatch, world):
    monkeypatch.setattr(intervals, "DRAWS", (600, 600))
    random, worlds, held = np.random.default_rng(1), 600, 0
    for _ in range(worlds):
        first, second, truth = world(random)
        found = interval([first], [second], "higher")
        held += found["low"] <= truth <= found["high"]
    assert abs(held / worlds - 0.95) < 3 * math.sqrt(0.95 * 0.05 / worlds)


@pytest.mark.parametrize("world", [normal_rewards, losses_per_token])
def test_equal_models_are_seldom_told_apart(monkeypatch, world):
    monkeypatch.setattr(intervals, "DRAWS", (600, 600))
    random, worlds, decided = np.random.default_rng(2), 400, 0
    for _ in range(worlds):
        first, second, truth = world(random)
        moved = np.array(second["sums"][0]) - truth * np.array(second["counts"][0])
        decided += interval([first], [by_row(moved, first["counts"][0])], "higher")["verdict"] != "not decided"
    assert decided / worlds < 0.05 + 3 * math.sqrt(0.05 * 0.95 / worlds)


def test_a_perplexity_falls_by_less_than_all_of_itself():
    random = np.random.default_rng(0)
    before = random.exponential(4, 30)
    found = interval([by_row(before, exponential=True)], [by_row(before / 20, exponential=True)], "lower")
    assert -math.exp(before.mean()) < found["low"] < found["high"] < 0 and found["verdict"] == "better"
    seeds = [by_row(before, exponential=True), by_row(before + 1, exponential=True)]
    first = np.mean([math.exp(before.mean()), math.exp(before.mean() + 1)])
    same = interval(seeds, seeds[::-1], "lower")
    assert (
        same["low"] == same["high"] == 0.0
        and interval(seeds, [by_row(before * 0, exponential=True)], "lower")["low"] > -first
    )


def test_mcnemar_by_hand():
    assert [mcnemar(5, 0), mcnemar(6, 0), mcnemar(0, 6)] == [2 / 32, 2 / 64, 2 / 64]
    assert [mcnemar(8, 2), mcnemar(10, 2)] == [2 * (1 + 10 + 45) / 2**10, 2 * (1 + 12 + 66) / 2**12]
    assert [mcnemar(0, 0), mcnemar(1, 1), mcnemar(3, 3)] == [1.0, 1.0, 1.0]
    assert 0 < mcnemar(5200, 4800) < 1e-4


def test_mcnemar_is_scipys_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    for gained in range(12):
        for lost in range(12 - gained):
            wanted = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
            assert mcnemar(gained, lost) == pytest.approx(wanted)


@pytest.mark.parametrize("rows", [6, 40, 168])
def test_an_interval_of_right_and_wrong_rows_agrees_with_mcnemars_test(rows):
    for gained in range(min(rows, 24) + 1):
        for lost in range(min(rows - gained, 24) + 1):
            found = interval(*([one] for one in rights(rows, gained, lost)), "higher")
            decided = mcnemar(gained, lost) < 0.05
            assert (found["verdict"] != "not decided") == decided == (not found["low"] <= 0 <= found["high"])
            assert -1 <= found["low"] <= (gained - lost) / rows <= found["high"] <= 1
            if decided:
                assert (found["verdict"] == "better") == (gained > lost) and found["rows_needed"] is None
            elif gained != lost:
                assert found["rows_needed"] > rows


def test_as_many_rows_as_are_needed_decide():
    small = interval(*([one] for one in rights(100, 12, 6)), "higher")
    times = small["rows_needed"] / 100
    for share, decided in ((0.7, False), (1.15, True)):
        counts = (round(number * times * share) for number in (100, 12, 6))
        found = interval(*([one] for one in rights(*counts)), "higher")
        assert (found["verdict"] == "better") == decided


def test_as_many_rows_as_are_needed_decide_a_mean():
    random = np.random.default_rng(3)
    before, change = random.normal(size=50), random.normal(size=50)
    change += 0.1 - change.mean()
    found = interval([by_row(before)], [by_row(before + change)], "higher")
    assert found["verdict"] == "not decided" and found["rows_needed"] == float(f"{found['rows_needed']:.1e}") > 50
    for share, decided in ((0.7, False), (1.4, True)):
        copies = round(found["rows_needed"] * share / 50)
        more = interval([by_row(np.tile(before, copies))], [by_row(np.tile(before + change, copies))], "higher")
        assert (more["verdict"] == "better") == decided


@pytest.mark.parametrize("pair", [rights(40, 20, 2), losses_per_token(np.random.default_rng(4))[:2]])
def test_the_verdict_flips_with_the_direction_and_with_the_sides(pair):
    first, second = pair
    verdicts = {
        (swapped, better): interval([a], [b], better)["verdict"]
        for swapped, (a, b) in enumerate(((first, second), (second, first)))
        for better in ("higher", "lower")
    }
    assert verdicts[0, "higher"] == verdicts[1, "lower"] != verdicts[0, "lower"] == verdicts[1, "higher"]
    assert {*verdicts.values()} == {"better", "worse"}


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
@pytest.mark.parametrize(
    "kind", [lambda rows: rights(rows, rows, 0), lambda rows: (by_row([0.0] * rows), by_row([0.5] * rows))]
)
def test_fewer_than_six_rows_decide_nothing(kind, rows):
    first, second = kind(rows)
    found = interval([first], [second], "higher")
    assert (found["verdict"] == "better") == (rows >= 6)
    assert rows >= 6 or (found["low"] <= 0 < found["high"] and found["rows_needed"] >= 6)


@pytest.mark.parametrize("pair", [rights(40, 0, 0), (by_row([0.3] * 40), by_row([0.3] * 40))])
def test_no_difference_is_not_decided(pair):
    found = interval([pair[0]], [pair[1]], "higher")
    assert found["low"] <= 0 <= found["high"]
    assert (found["verdict"], found["rows_needed"]) == ("not decided", None)


def test_other_rows_no_rows_and_no_numbers_have_no_interval():
    some = by_row(range(8))
    assert interval([some], [by_row(range(8), rows="others")], "higher") is None
    assert interval([some], [by_row([math.nan, *range(7)])], "higher") is None
    assert interval([some], [some | {"sums": [[None, *range(7)]]}], "higher") is None  # as JSON has it
    assert interval([by_row([0.0], [0])], [by_row([0.0], [0])], "higher") is None


def test_rows_without_a_number_count_for_nothing():
    values, random = np.random.default_rng(5).normal(size=(2, 20)), np.random.default_rng(6)
    places = random.permutation(50)[:20]
    padded, counts = np.zeros((2, 50)), np.zeros(50)
    padded[:, np.sort(places)], counts[places] = values, 1
    plain = interval(*([by_row(one)] for one in values), "higher")
    assert interval(*([by_row(one, counts)] for one in padded), "higher") == plain


def test_sums_and_counts_are_drawn_together():
    """Loss per token: rows that are longer weigh more, and a difference that is the same for each token is certain."""
    tokens = np.arange(1, 31)
    before = tokens * np.random.default_rng(7).normal(4, 1, 30)
    found = interval([by_row(before, tokens)], [by_row(before - 0.5 * tokens, tokens)], "lower")
    assert (found["low"], found["high"]) == (pytest.approx(-0.5), pytest.approx(-0.5)) and found["verdict"] == "better"


def test_several_models_of_a_side_are_averaged():
    random = np.random.default_rng(8)
    first, second, third = (random.normal(mean, 1, 50) for mean in (0, 1, 2))
    both = interval([by_row(first)], [by_row(second), by_row(third)], "higher")
    mean = interval([by_row(first)], [by_row((second + third) / 2)], "higher")
    assert [both["low"], both["high"]] == pytest.approx([mean["low"], mean["high"]])


def test_an_interval_costs_little_time_and_memory():
    values = np.random.default_rng(9).normal(size=(2, 168))
    pair, seconds = [[by_row(one)] for one in values], []
    for _ in range(3):
        started = time.process_time()
        interval(*pair, "higher")
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.1
    assert sum(len(draws) for draws in intervals._draws(168)) == 10_000
    for rows in (10_000, 3 * AT_ONCE):
        draws = next(intervals._draws(rows))
        assert draws.size <= max(AT_ONCE, rows) and (draws.sum(1) == rows).all()


def test_terms_by_row_are_the_same_from_batches_of_any_order():
    examples = [
        Example(id, [1] * size, [False] + [True] * (size - 1))
        for id, size in zip("bacab", (3, 5, 2, 4, 6), strict=True)
    ]
    values = torch.arange(5.0, dtype=torch.float64)

    def batch(numbers):
        terms = {
            "nll": Term(values[numbers], sum(len(examples[k]) - 1 for k in numbers), "tokens", 0.5),
            "pairs": Term(values[numbers] ** 2, len(numbers), "rows"),
            "kl": Term(torch.tensor(1.0), len(numbers), "rows", 0.0),
        }
        return numbers, terms

    def counts(example):
        return {"tokens": len(example) - 1, "rows": 1}

    found = terms_by_row(examples, counts, [batch([0, 3]), batch([4, 2, 1])])
    assert found == terms_by_row(examples, counts, [batch([2, 1]), batch([0, 4, 3])])
    assert found.keys() == {"nll", "pairs", "loss"}  # kl is a sum
    assert found["nll"]["sums"] == [[4.0, 4.0, 2.0]] and found["nll"]["counts"] == [[7.0, 7.0, 1.0]]  # a, b, c
    averages = Averages()
    averages.add(batch([0, 1, 2, 3, 4])[1])
    whole = sum(sum(s) / sum(c) for s, c in zip(found["loss"]["sums"], found["loss"]["counts"], strict=True))
    assert whole == pytest.approx(averages.over_processes()["loss"])
    assert terms_by_row([], counts, []) == {}


def test_every_score_says_which_way_it_gets_better():
    assert {style.better for style in SCORES.values()} == {"higher", "lower", None}
    assert [name for name, style in SCORES.items() if style.better is None] == ["reward_std"]  # a spread


def test_the_table_has_interval_verdict_and_rows_that_would_decide_within_100_columns():
    base = {"rows": 168, "loss": 4.0, "accuracy": 0.196, "probe_perplexity": 43.55, "rewards/margins": -0.1}
    tuned = {"rows": 168, "loss": 0.2, "accuracy": 0.845, "probe_perplexity": 44.03, "rewards/margins": 0.2}
    found = {
        "loss": {"low": -3.9, "high": -3.7, "verdict": "better", "rows_needed": None},
        "accuracy": {"low": 0.571, "high": 0.72, "verdict": "better", "rows_needed": None},
        "probe_perplexity": {"low": -0.3, "high": 1.26, "verdict": "not decided", "rows_needed": 4300},
        "rewards/margins": {"low": 0.25, "high": 0.35, "verdict": "better", "rows_needed": None},
    }
    console = Console(width=100, file=io.StringIO())
    console.print(comparison(base, tuned, found))
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "│ loss │ 4.000 │ 0.200 │ -3.800 (-3.90 to -3.70) │ better │" in lines
    assert "│ answer accuracy │ 19.6% │ 84.5% │ +64.9% (+57 to +72) │ better │" in lines
    assert "│ perplexity on general text │ 43.55 │ 44.03 │ +1.1% (-0.7 to +2.9) │ not decided (~4,300) │" in lines
    assert "│ margin of rewards │ -0.100 │ 0.200 │ +0.300 (+0.25 to +0.35) │ better │" in lines
