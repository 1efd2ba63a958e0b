"""How often one model's answers are preferred to another's, with limits that hold however often one looks.

A vote is 1, 0, or for a tie 1/2. The limits are a confidence sequence: with probability 95 % they hold the true rate after every
vote at once, so one may look after each and stop when one likes. Whoever bets against a rate m, on q instead, multiplies a
capital of 1 by 1 + (x - m) (q - m) / (m (1 - m)) with each vote x: by q / m with a 1, by (1 - q) / (1 - m) with a 0, by the mean
of both with a tie. If m is the true mean the capital stays 1 on average, also when it is spread over many q, and by Ville's
inequality it ever reaches 1 / alpha with probability alpha at most; so a rate against which it does is left out (Waudby-Smith and
Ramdas 2023, arXiv 2010.09686). Against 1/2 a tie changes nothing. The logarithm of the capital is convex in m, so that what is
left is an interval.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Verdict = Literal["better", "worse", "not decided"]
ALPHA = 0.05
REACHED = math.log(1 / ALPHA)
# The q, spread like Beta(A, A). Of 1, 2, 4, 8 and 15 the A that decides with the fewest votes: rates of 60, 70 and 80 % with
# 184, 47 and 23 in the median.
A = 4
Q = np.arange(1, 200) / 200
WEIGHTS = np.log((Q * (1 - Q)) ** (A - 1) / ((Q * (1 - Q)) ** (A - 1)).sum())
MOST = 100_000  # votes that are looked ahead
STEPS = 40  # of a bisection


class WinRate(TypedDict):
    """Rate and limits after all votes, what they mean for the first model, and about how many more votes would decide.

    `verdict` is that of the first moment at which 1/2 was outside; `more` is None where it is decided or nothing points anywhere.
    """

    votes: int
    rate: float | None
    low: float
    high: float
    verdict: Verdict
    more: int | None


class Sides(TypedDict):
    """How often a rater took the left side, of the votes that took one, and whether that is more or less than chance."""

    votes: int
    rate: float | None
    low: float
    high: float
    biased: bool


def win_rate(votes: Sequence[float]) -> WinRate:
    """The rate of `votes` (1: the first is better, 0: the second, 1/2: a tie) in the order in which they were given.

    >>> win_rate([1.0] * 11)["verdict"], win_rate([1.0, 0.0, 0.5])["verdict"]
    ('better', 'not decided')
    """
    if not votes:
        return WinRate(votes=0, rate=None, low=0.0, high=1.0, verdict="not decided", more=None)
    given = np.array(votes, dtype=float)
    counts = np.stack([given == 1, given == 0, given == 0.5], 1).cumsum(0).astype(float)  # (V, 3): wins, losses, ties
    decided = np.flatnonzero(capital(counts, 0.5) >= REACHED)
    wins, losses, _ = counts[decided[0] if len(decided) else -1]
    verdict: Verdict = "not decided" if not len(decided) else "better" if wins > losses else "worse"
    rate = float(given.mean())
    low, high = (_limit(counts[-1], rate, end) for end in (0.0, 1.0))
    # What one moment has left out stays out, as long as the rate itself is not there.
    low = min(max(low, 0.5), rate) if verdict == "better" else low
    high = max(min(high, 0.5), rate) if verdict == "worse" else high
    more = _more(counts[-1]) if verdict == "not decided" else None
    return WinRate(votes=len(given), rate=rate, low=low, high=high, verdict=verdict, more=more)


def sides(took_left: Iterable[bool]) -> Sides:
    """Whether a rater prefers a side. Sides are drawn by chance: without a preference the rate is 1/2, whatever is better."""
    found = win_rate([float(left) for left in took_left])
    biased = found["verdict"] != "not decided"
    return Sides(votes=found["votes"], rate=found["rate"], low=found["low"], high=found["high"], biased=biased)


def capital(counts: Array, m: float) -> Array:
    """Logarithm (V,) of the capital against the rate `m` after so many wins, losses and ties (V, 3)."""
    win, loss = Q / m, (1 - Q) / (1 - m)
    exponents = counts @ np.log(np.stack([win, loss, (win + loss) / 2])) + WEIGHTS  # (V, q)
    return np.asarray(np.logaddexp.reduce(exponents, axis=-1))


def _limit(counts: Array, rate: float, end: float) -> float:
    """The limit between the observed rate and 0 or 1 (`end`), by bisection."""
    inside, outside = rate, end
    for _ in range(STEPS):
        middle = (inside + outside) / 2
        if middle in (0.0, 1.0) or capital(counts[None], middle)[0] >= REACHED:
            outside = middle
        else:
            inside = middle
    return outside if abs(outside - end) < 1e-9 else inside


def _more(counts: Array) -> int | None:
    """Further votes that would decide if they went on like those so far; None where they would not within `MOST`."""
    n = counts.sum()
    ahead = np.unique(np.geomspace(1, MOST, 400).astype(int))
    found = np.flatnonzero(capital(counts * (1 + ahead / n)[:, None], 0.5) >= REACHED)
    return int(ahead[found[0]]) if len(found) else None
