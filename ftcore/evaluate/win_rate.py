"""How often one model's answers are preferred to another's, with limits that hold however often one looks.

A vote is 1, 0, or for a tie 1/2. The limits are a confidence sequence: with probability 95 % they hold the true rate after every
vote at once, so one may look after each and stop when one likes. A rate m is left out once the mixture over q ~ Beta(a, a) of

    product over votes x of (q / m)^x ((1 - q) / (1 - m))^(1 - x)

reaches 1 / alpha. For votes in [0, 1] of mean m each factor is convex in x, hence at most 1 on average, and by Ville's inequality
the product reaches 1 / alpha with probability alpha at most (Robbins 1970; Howard et al. 2021, arXiv 1810.08240).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, TypedDict

ALPHA = 0.05
# Of the mixture. Of 1, 2, 4, 8 and 15 the one that decides with the fewest votes: rates of 60, 70 and 80 % with 182, 44 and 23
# in the median.
A = 4.0
MOST = 100_000  # votes that are looked ahead
Verdict = Literal["better", "worse", "not decided"]


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

    >>> win_rate([1.0] * 9)["verdict"], win_rate([1.0, 0.0])["verdict"]
    ('better', 'not decided')
    """
    total, verdict, low, high = 0.0, "not decided", 0.0, 1.0
    for n, vote in enumerate(votes, 1):
        total += vote
        if verdict == "not decided" and _evidence(total, n, 0.5) >= math.log(1 / ALPHA):
            verdict = "better" if total > n / 2 else "worse"
    n = len(votes)
    if n:
        low, high = _limit(total, n, 0.0), _limit(total, n, 1.0)
        low = max(low, 0.5) if verdict == "better" else low  # what one moment has left out stays out
        high = min(high, 0.5) if verdict == "worse" else high
    more = _more(total, n) if verdict == "not decided" and n else None
    return WinRate(votes=n, rate=total / n if n else None, low=low, high=high, verdict=verdict, more=more)  # type: ignore[typeddict-item]


def sides(took_left: Iterable[bool]) -> Sides:
    """Whether a rater prefers a side. Sides are drawn by chance: without a preference the rate is 1/2, whatever is better."""
    found = win_rate([float(left) for left in took_left])
    biased = found["verdict"] != "not decided"
    return Sides(votes=found["votes"], rate=found["rate"], low=found["low"], high=found["high"], biased=biased)


def _evidence(total: float, n: int, m: float) -> float:
    """Logarithm of the mixture for the mean `m` after `n` votes of this sum."""
    return _log_beta(A + total, A + n - total) - _log_beta(A, A) - _log_power(m, total) - _log_power(1 - m, n - total)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _log_power(base: float, exponent: float) -> float:
    return exponent * math.log(base) if exponent else 0.0


def _limit(total: float, n: int, end: float) -> float:
    """The limit between the observed rate and 0 or 1 (`end`), by bisection: evidence grows away from the rate."""
    inside, outside = total / n, end
    if inside == end:
        return end
    for _ in range(40):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if _evidence(total, n, middle) < math.log(1 / ALPHA) else (inside, middle)
    return inside


def _more(total: float, n: int) -> int | None:
    """Votes after `n` that would decide if they went on at the same rate; None where they would not within `MOST`."""
    step = n
    while _evidence(total * (1 + step / n), n + step, 0.5) < math.log(1 / ALPHA):
        step *= 2
        if step > MOST:
            return None
    least = 0
    while step - least > 1:
        middle = (least + step) // 2
        decided = _evidence(total * (1 + middle / n), n + middle, 0.5) >= math.log(1 / ALPHA)
        least, step = (least, middle) if decided else (middle, step)
    return step
