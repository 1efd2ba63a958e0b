"""Win-rates may be looked at after every vote: no preference is seldom taken for one, and one is soon found out."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest

from ftcore.evaluate.preferences import agreement, compared_authors, counts, preferred, raters
from ftcore.evaluate.win_rate import ALPHA, MOST, A, Q, capital, sides, win_rate

RATERS = 2_000
NOISE = 1.96 * math.sqrt(ALPHA * (1 - ALPHA) / RATERS)


def evidence(wins, losses):
    """Logarithm of what bets on each of `Q` against 1/2 have made, worked out anew; ties change nothing."""
    shares = (Q * (1 - Q)) ** (A - 1)
    made = np.multiply.outer(wins, np.log(2 * Q)) + np.multiply.outer(losses, np.log(2 * (1 - Q)))
    top = made.max(-1, keepdims=True)
    return np.log((np.exp(made - top) * shares / shares.sum()).sum(-1)) + top[..., 0]


def needed(most):
    """How many of n votes that are no tie must agree to decide, for n up to `most`; n + 1 where none are enough."""
    n = np.arange(most + 1.0)
    low, high = np.floor(n / 2), n + 1  # not enough, enough
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        enough = evidence(middle, n - middle) >= math.log(1 / ALPHA)
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high


def simulated(rate, ties, most, seed):
    """Votes (raters, most) of 1, 0 and 1/2, and after how many of them each is decided; most + 1: after none."""
    draw = np.random.default_rng(seed)
    votes = (draw.random((RATERS, most)) < rate).astype(float)
    votes[draw.random((RATERS, most)) < ties] = 0.5
    wins, losses = (votes == 1).cumsum(1), (votes == 0).cumsum(1)
    decided = np.maximum(wins, losses) >= needed(most)[wins + losses]
    return votes, np.where(decided.any(1), decided.argmax(1) + 1, most + 1)


def exact(rate, most):
    """The probability that n votes without ties have decided at one of the looks so far, for n up to `most`."""
    wins, enough = np.arange(most + 2), needed(most)
    undecided, decided = np.eye(most + 2)[0], np.zeros(most + 1)
    for n in range(1, most + 1):
        undecided = undecided * (1 - rate) + np.roll(undecided, 1) * rate
        now = (wins <= n) & (np.maximum(wins, n - wins) >= enough[n])
        decided[n], undecided[now] = undecided[now].sum(), 0.0
    return decided.cumsum()


def assert_that_the_product_says_the_same(votes, after, says=win_rate):
    """That it decides where the simulation does, neither a vote earlier nor later."""
    most = votes.shape[1]
    for rater in [*np.flatnonzero(after <= most)[:12], *np.flatnonzero(after > most)[:6]]:
        own, n = votes[rater].tolist(), int(after[rater])
        assert says(own[: n - 1])["verdict"] == "not decided"
        if n <= most:
            side = "better" if sum(own[:n]) > n / 2 else "worse"
            assert says(own[:n])["verdict"] == says(own)["verdict"] == side


def test_the_capital_is_what_the_bets_have_made():
    wins, losses = np.random.default_rng(0).integers(0, 300, (2, 200))
    ties = np.random.default_rng(1).integers(0, 300, 200)
    found = capital(np.stack([wins, losses, ties], 1).astype(float), 0.5)
    assert found == pytest.approx(evidence(wins, losses), abs=1e-8)


@pytest.mark.parametrize("ties", [0.0, 0.3])
def test_of_raters_without_a_preference_few_ever_see_one(ties):
    votes, after = simulated(0.5, ties, 1_000, seed=1)
    false = (after <= 1_000).mean()
    upper = false + 1.96 * math.sqrt(false * (1 - false) / RATERS)
    print(f"false decisions with {ties:.0%} ties: {false:.2%}, at most {upper:.2%}")
    assert false > 0.01 and upper <= 0.06
    assert_that_the_product_says_the_same(votes, after)


def test_what_is_simulated_is_what_can_be_worked_out():
    false, true = exact(0.5, 1_000), exact(0.7, 1_000)
    print(
        f"false decisions: {false[-1]:.2%}; at 70 %: median {(true >= 0.5).argmax()} votes, within 200 {true[200]:.2%}"
    )
    assert 0.03 < false[-1] < ALPHA and (true >= 0.5).argmax() == 47 and true[200] > 0.99
    for rate, exactly in ((0.5, false), (0.7, true)):
        after = simulated(rate, 0.0, 1_000, seed=7)[1]
        for n in (20, 50, 100, 1_000):
            assert abs((after <= n).mean() - exactly[n]) < 4 * math.sqrt(0.25 / RATERS)


@pytest.mark.slow
def test_the_product_itself_is_as_seldom_wrong():
    votes, after = simulated(0.5, 0.3, 300, seed=2)
    said = np.array([win_rate(own)["verdict"] != "not decided" for own in votes.tolist()])
    assert (said == (after <= 300)).all() and said.mean() <= ALPHA + NOISE


def test_a_preference_of_70_percent_is_found_within_200_votes():
    votes, after = simulated(0.7, 0.0, 1_000, seed=3)
    print(f"median {np.median(after):.0f} votes, within 200: {(after <= 200).mean():.1%}")
    assert 30 < np.median(after) < 60 and (after <= 200).mean() >= 0.95
    assert_that_the_product_says_the_same(votes[:, :300], after)
    assert np.median(simulated(0.7, 0.3, 1_000, seed=4)[1]) < 100


def test_who_takes_one_side_is_named_and_who_does_not_is_not():
    for rate, least, most in ((0.7, 0.95, 1.0), (0.3, 0.95, 1.0), (0.5, 0.0, ALPHA + NOISE)):
        votes, after = simulated(rate, 0.0, 200, seed=5)
        assert least <= (after <= 200).mean() <= most, rate
        for own, n in zip(votes[:40] == 1, after, strict=False):
            assert sides(own.tolist())["biased"] == (n <= 200)


@pytest.mark.parametrize(("rate", "ties"), [(0.5, 0.5), (0.7, 0.2), (0.95, 0.0)])
def test_the_limits_hold_the_true_rate_at_all_times(rate, ties):
    draw, raters, most = np.random.default_rng(6), 300, 150
    votes = np.where(draw.random((raters, most)) < ties, 0.5, draw.random((raters, most)) < rate)
    given = np.stack([votes == 1, votes == 0, votes == 0.5], -1).cumsum(1).astype(float)
    truth = rate * (1 - ties) + ties / 2
    outside = capital(given.reshape(-1, 3), truth).reshape(raters, most) >= math.log(1 / ALPHA)
    assert outside.any(1).mean() <= ALPHA + 1.96 * math.sqrt(ALPHA * (1 - ALPHA) / raters)
    for own, out in zip(votes[:20].tolist(), outside[:, -1], strict=False):
        found = win_rate(own)
        assert out == (not found["low"] <= truth <= found["high"])


def random_votes(seed, most=120):
    draw = random.Random(seed)
    weights = draw.choice([(1, 1, 1), (5, 2, 1), (1, 6, 0), (0, 1, 3), (1, 0, 0), (0, 0, 1)])
    return draw.choices((1.0, 0.0, 0.5), weights, k=draw.randint(1, most))


def inside(found):
    return 0 <= found["low"] <= found["rate"] <= found["high"] <= 1


def test_the_limits_are_around_the_rate():
    for seed in range(60):
        votes = random_votes(seed)
        found = win_rate(votes)
        assert inside(found), seed
        assert found["votes"] == len(votes) and found["rate"] == pytest.approx(sum(votes) / len(votes))
        outside = {"better": found["low"] >= 0.5, "worse": found["high"] <= 0.5}
        assert outside.get(found["verdict"], found["low"] <= 0.5 <= found["high"])


def test_the_limits_close_in():
    widths = [(found := win_rate([1.0, 0.5, 0.0, 1.0] * times))["high"] - found["low"] for times in (1, 4, 16, 64, 256)]
    assert all(more < 0.8 * few for few, more in pairwise(widths)) and widths[-1] < 0.1


def test_the_other_way_round_it_is_the_other_way_round():
    verdicts = {"better": "worse", "worse": "better", "not decided": "not decided"}
    for seed in range(60):
        votes = random_votes(seed)
        found, turned = win_rate(votes), win_rate([1 - vote for vote in votes])
        assert turned["verdict"] == verdicts[found["verdict"]] and turned["more"] == found["more"]
        assert (turned["low"], turned["high"]) == pytest.approx((1 - found["high"], 1 - found["low"]), abs=1e-6)


def test_a_better_vote_never_makes_it_worse():
    order = ["worse", "not decided", "better"]
    for seed in range(60):
        votes = random_votes(seed)
        place = random.Random(seed).randrange(len(votes))
        found, raised = win_rate(votes), win_rate([*votes[:place], min(votes[place] + 0.5, 1.0), *votes[place + 1 :]])
        assert order.index(raised["verdict"]) >= order.index(found["verdict"])
        assert raised["low"] >= found["low"] - 1e-9 and raised["high"] >= found["high"] - 1e-9


def test_what_was_decided_once_stays_so():
    votes = [1.0] * 11
    assert win_rate(votes[:-1])["verdict"] == "not decided"
    for losses in range(0, 12):
        found = win_rate(votes + [0.0] * losses)
        assert found["verdict"] == "better" and found["low"] >= 0.5 and found["more"] is None
    assert win_rate([1.0, 0.0] * 5 + [0.0] * 30 + [1.0] * 25)["verdict"] == "worse"


@pytest.mark.parametrize("losses", [12, 1_000])
def test_the_limits_are_around_the_rate_where_it_has_turned_since(losses):
    assert inside(win_rate([1.0] * 11 + [0.0] * losses))


@pytest.mark.parametrize(
    "cycle", [[1.0, 1.0, 0.0], [0.0, 0.5, 0.0, 1.0], [1.0, 0.5, 0.5, 0.5], [1.0, 0.0] * 9 + [1.0] * 2, [1.0]]
)
def test_as_many_more_votes_as_are_said_decide(cycle):
    times = max(1, 6 // len(cycle))
    votes = cycle * times
    more = win_rate(votes)["more"]
    enough = win_rate(cycle * math.ceil(times + more / len(cycle)))
    assert enough["verdict"] == ("better" if sum(cycle) > len(cycle) / 2 else "worse")
    few = math.floor(times + 0.7 * (more - 1) / len(cycle))
    assert few >= times and win_rate(cycle * few)["verdict"] == "not decided"


def test_more_votes_are_asked_for_only_where_they_lead_somewhere():
    assert win_rate([1.0, 0.0] * 10)["more"] is None and win_rate([0.5] * 10)["more"] is None
    assert win_rate([1.0] * 501 + [0.0] * 499)["more"] is None  # not within MOST
    assert win_rate([1.0] * 30)["more"] is None
    assert 0 < win_rate([1.0, 0.0] * 10 + [1.0])["more"] < MOST


def test_without_votes_nothing_is_known():
    expected = {"votes": 0, "rate": None, "low": 0.0, "high": 1.0}
    assert win_rate([]) == expected | {"verdict": "not decided", "more": None}
    assert sides([]) == expected | {"biased": False}


# Votes of a store.


def vote(prompt, authors, choice, purpose="measure", rater="Ann", ids=(1, 2)):
    names = dict(zip(("left_author", "right_author", "left_id", "right_id"), (*authors, *ids), strict=True))
    return {"prompt": prompt, "choice": choice, "purpose": purpose, "rater": rater, **names}


def rate(votes, first="a", second="b"):
    found = preferred(votes, first, second)
    return found["votes"], found["rate"]


@pytest.mark.parametrize(
    ("authors", "choice", "score"),
    [("ab", "left", 1.0), ("ab", "right", 0.0), ("ba", "left", 0.0), ("ba", "right", 1.0), ("ab", "tie", 0.5),
     ("ba", "tie", 0.5), ("ab", "both_bad", 0.5), ("ba", "both_bad", 0.5)],
)  # fmt: skip
def test_what_is_preferred_does_not_depend_on_the_side(authors, choice, score):
    assert rate([vote(1, authors, choice)]) == (1, score)
    assert rate([vote(1, authors, choice)], "b", "a") == (1, 1 - score)


def test_only_measuring_votes_of_these_two_count():
    others = [vote(1, "ac", "left"), vote(2, "cb", "left"), vote(3, "ab", "left", "teach"), vote(4, "aa", "left")]
    others += [vote(5, ("a", None), "good"), vote(6, "ab", "skip")]
    assert rate(others) == (0, None)
    assert rate([*others, vote(1, "ab", "right"), vote(6, "ab", "left")]) == (2, 0.5)


def test_only_the_first_vote_on_a_prompt_counts():
    again = [vote(1, "ab", "left"), vote(1, "ba", "left"), vote(1, "ab", "right", rater="Bob"), vote(2, "ba", "right")]
    assert rate(again) == (2, 1.0) and rate(again[::-1]) == (2, 0.5)


def test_authors_that_were_compared_are_named_once():
    votes = [vote(1, "ba", "left"), vote(2, "ab", "tie"), vote(3, "ca", "left"), vote(4, "aa", "left")]
    votes += [vote(5, "bc", "left", "teach"), vote(6, ("b", None), "good")]
    assert compared_authors(votes) == [("a", "b"), ("a", "c")]


def test_raters_are_looked_at_one_by_one():
    votes = [vote(k, "ab", "left", rater="Left") for k in range(20)]
    votes += [vote(k, "ab", ("left", "right")[k % 2], "teach", rater="Both") for k in range(40)]
    votes += [vote(k, "ab", choice, rater="None") for k, choice in enumerate(("tie", "both_bad", "skip", "good"))]
    found = raters(votes)
    assert {name: (one["votes"], one["rate"], one["biased"]) for name, one in found.items()} == {
        "Left": (20, 1.0, True), "Both": (40, 0.5, False), "None": (0, None, False),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "agreed"),
    [(("left", (1, 2)), ("left", (1, 2)), 1), (("left", (1, 2)), ("right", (2, 1)), 1),
     (("left", (1, 2)), ("left", (2, 1)), 0), (("tie", (1, 2)), ("tie", (2, 1)), 1), (("tie", (1, 2)), ("left", (1, 2)), 0),
     (("tie", (1, 2)), ("both_bad", (1, 2)), 0)],
)  # fmt: skip
def test_raters_agree_on_answers_whatever_the_side(first, second, agreed):
    votes = [
        vote(1, "aa", choice, rater=name, ids=ids)
        for name, (choice, ids) in zip(("Ann", "Bob"), (first, second), strict=True)
    ]
    assert agreement(votes) == {"pairs": 1, "agreed": agreed}
    third = vote(1, "aa", "left", rater="Cem", ids=(1, 3))
    assert agreement([votes[0], third, vote(1, "aa", "left", rater="Ann", ids=(1, 3))]) == {"pairs": 1, "agreed": 1}


def test_who_votes_alone_agrees_with_nobody():
    votes = [vote(1, "ab", "left"), vote(1, "ab", "right"), vote(2, ("a", None), "good", ids=(3, None))]
    votes += [vote(2, ("a", None), "good", rater="Bob", ids=(3, None))]
    assert agreement(votes) == {"pairs": 0, "agreed": 0} == agreement([])


def test_votes_are_counted_by_what_they_teach():
    choices = ("left", "right", "tie", "both_bad", "good", "bad", "edit", "skip")
    teaching = [vote(k, "ab", choice, "teach") for k, choice in enumerate(choices)]
    assert counts(teaching) == {"pairs": 2, "labels": 3, "corrections": 1, "measuring": 0}
    assert counts([vote(1, "ab", "left"), vote(2, "ab", "tie")])["measuring"] == 2
    assert set(counts([]).values()) == {0}
