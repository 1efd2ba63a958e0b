"""Could the difference between two models on the same rows be chance?

Both models were scored on the same rows, so rows are drawn in pairs. A score that is right or wrong on each row: McNemar's exact
test (McNemar 1947) on the rows that one model alone has right, and the interval of Agresti and Min (2005). Any other score: the
paired bootstrap (Efron and Tibshirani 1993, chapter 13), which draws rows with replacement and computes the score anew, sums and
counts apart, and of an exponential, such as perplexity, the ratio. Dror et al. (2018, P18-1128) compare both for language
processing. Rows are all that is drawn: how another seed would have trained is not in these intervals.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from ftcore.run_folder import RowScore

Array = NDArray[np.float64]
Better = Literal["higher", "lower"]
Verdict = Literal["better", "worse", "not decided"]
ALPHA = 0.05
Z = NormalDist().inv_cdf(1 - ALPHA / 2)
FEWEST = 6  # rows that can decide: five that all agree have p = 2 / 2^5 > ALPHA
DRAWS = 1_000, 10_000  # at least, at most
DRAWN = 5_000_000  # rows in all draws together, between these limits
AT_ONCE = 1_000_000  # of them in memory
HIGHEST = 350  # logarithm of a number whose square a float can hold


class Score(NamedTuple):
    """A score's sums and counts (R, T) of R rows and T terms, and whether it is the exponential of their ratio."""

    sums: Array
    counts: Array
    exponential: bool


class Interval(TypedDict):
    """The 95 % interval of a difference, what it means, and about how many rows would decide a difference of this size.

    `rows_needed` is None where it is decided, or where there is no difference.
    """

    low: float
    high: float
    verdict: Verdict
    rows_needed: int | None


class _Test(NamedTuple):
    """Limits, whether the difference is decided, and how many times as many rows would decide it."""

    low: float
    high: float
    decided: bool
    times: float | None


def interval(first: Sequence[RowScore], second: Sequence[RowScore], better: Better) -> Interval | None:
    """The interval of `second` minus `first`, each the mean of its scores, and whether `second` is better.

    None where they are not of the same rows, or not finite. What is not decided has zero in its interval.
    """
    both = [*first, *second]
    if len({one["rows"] for one in both}) > 1:
        return None
    counted = np.any([np.any(one["counts"], axis=0) for one in both], axis=0)  # (R,)
    before, after = ([_of_rows(one, counted) for one in side] for side in (first, second))
    rows = int(counted.sum())
    if not rows or not all(np.isfinite(one.sums).all() for one in (*before, *after)):
        return None
    test = (_mcnemar if _right_or_wrong(before, after) else _bootstrap)(before, after)
    if test.decided:
        verdict: Verdict = "better" if (test.low + test.high > 0) == (better == "higher") else "worse"
        return Interval(low=test.low, high=test.high, verdict=verdict, rows_needed=None)
    needed = None if test.times is None else _two_digits(max(rows * test.times, FEWEST))
    return Interval(low=min(test.low, 0.0), high=max(test.high, 0.0), verdict="not decided", rows_needed=needed)


def _of_rows(score: RowScore, rows: NDArray[np.bool_]) -> Score:
    sums, counts = (np.array(score[name], dtype=float).T[rows] for name in ("sums", "counts"))
    return Score(sums, counts, score["exponential"])


def _right_or_wrong(first: list[Score], second: list[Score]) -> bool:
    """Whether each side is one score that gives every row a 0 or a 1."""
    both = [*first, *second]
    if len(both) > 2 or any(one.exponential or one.sums.shape[1] > 1 for one in both):
        return False
    return all((one.counts == 1).all() and np.isin(one.sums, (0, 1)).all() for one in both)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test: `gained` rows are right in the second model alone, `lost` ones in the first.

    >>> mcnemar(6, 0), mcnemar(1, 1)
    (0.03125, 1.0)
    """
    n, tail, term = gained + lost, 0, 1
    for k in range(min(gained, lost) + 1):
        tail, term = tail + term, term * (n - k) // (k + 1)  # term: n over k
    return min(2 * tail / 2**n, 1.0)


def _mcnemar(first: list[Score], second: list[Score]) -> _Test:
    before, after = first[0].sums, second[0].sums
    rows, gained, lost = len(before), int((after > before).sum()), int((after < before).sum())
    changed, difference = gained + lost, gained - lost
    # Agresti and Min: half a row is added to each of the four kinds of rows.
    half = Z * math.sqrt(changed + 1 - difference**2 / (rows + 2)) / (rows + 2)
    low, high = (max(-1.0, min(difference / (rows + 2) + side, 1.0)) for side in (-half, half))
    # With k times the rows: (k |d| - 1)^2 = Z^2 k m, where McNemar's statistic, corrected for continuity, decides.
    root = Z * math.sqrt(changed) + math.sqrt(Z**2 * changed + 4 * abs(difference))
    times = (root / (2 * abs(difference))) ** 2 if difference else None
    return _Test(low, high, mcnemar(gained, lost) < ALPHA, times)


def _bootstrap(first: list[Score], second: list[Score]) -> _Test:
    rows, once = len(first[0].sums), np.ones((1, len(first[0].sums)))
    difference = float(_differences(first, second, once)[0])
    drawn = np.concatenate([_differences(first, second, weights) for weights in _draws(rows)])
    wider = _widening(rows)
    low, high = (difference + wider * (float(q) - difference) for q in np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2]))
    to_zero = difference - (low if difference > 0 else high)  # from the difference to its limit on the side of zero
    times = to_zero / difference * (to_zero / difference) if difference else None
    decided = rows >= FEWEST and not low <= 0 <= high
    if first[0].exponential:  # from the limits of the logarithm of the ratio to those of the difference
        before = math.exp(min(float(_mean(first, once)[0]), HIGHEST))
        low, high = (before * math.expm1(min(limit, HIGHEST)) for limit in (low, high))
    return _Test(low, high, decided, times)


def _draws(rows: int) -> Iterator[Array]:
    """How often each draw has each row (D, R), a few draws at a time; the same draws in every call."""
    random, (least, most) = np.random.default_rng(0), DRAWS
    left = min(max(DRAWN // rows, least), most)
    while left:
        size = min(left, max(AT_ONCE // rows, 1))
        drawn = random.integers(rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows).astype(float)
        left -= size


def _differences(first: list[Score], second: list[Score], weights: Array) -> Array:
    """The difference (D,) of the means in each draw, from how often it has each row (D, R).

    Of exponentials, such as perplexity, it is that of the logarithms: a ratio is never below 0, whatever is drawn.
    """
    return _mean(second, weights) - _mean(first, weights)


def _mean(side: list[Score], weights: Array) -> Array:
    """The mean (D,) of a side's scores in each draw; of exponentials its logarithm."""
    totals = np.array([(weights @ one.sums / np.maximum(weights @ one.counts, 1)).sum(1) for one in side])
    if side[0].exponential:
        return np.asarray(np.logaddexp.reduce(totals, axis=0) - math.log(len(side)))
    return np.asarray(totals.mean(axis=0))


def _widening(rows: int) -> float:
    """By how much few rows make the bootstrap's interval too narrow: it divides by n, and is normal where Student's t is right.

    The quantile of t by its expansion (Abramowitz and Stegun 26.7.5); after Hesterberg (2015).
    """
    free = max(rows - 1, 1)
    return math.sqrt(rows / free) * (1 + (Z**2 + 1) / (4 * free) + (5 * Z**4 + 16 * Z**2 + 3) / (96 * free**2))


def _two_digits(number: float) -> int | None:
    """A number rounded up to two digits; None for more than a billion."""
    if number > 1e9:
        return None
    unit = 10 ** max(math.floor(math.log10(number)) - 1, 0)
    return math.ceil(number / unit) * unit
