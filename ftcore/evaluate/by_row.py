"""Scores and what each row adds to them, from which intervals.py tells how sure they are. No text of a row is in it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ftcore.files import short_hash
from ftcore.methods.terms import ByRow, Term
from ftcore.run_folder import RowScore, RowScores, Scores

# What an example adds to the counts that terms are divided by.
Counts = Callable[[Any], Mapping[str, int]]
# Numbers of a batch's examples, and the terms of their loss.
Batch = tuple[list[int], dict[str, Term]]


class Scored(NamedTuple):
    """Scores, and those of them that can be told by row."""

    scores: Scores
    by_row: RowScores


def means(columns: Mapping[str, ByRow | float | None], rows: object) -> Scored:
    """The mean of each column, None where no row has a number; numbers as they are. `rows` is what the rows hold."""
    scored, identity = Scored(Scores(), RowScores()), short_hash(repr(rows))
    for name, column in columns.items():
        if not isinstance(column, list):
            scored.scores[name] = column
            continue
        known = [float(number) for number in column if number is not None]
        scored.scores[name] = float(np.mean(known)) if known else None
        if known:
            sums, counts = [float(x or 0) for x in column], [float(x is not None) for x in column]
            scored.by_row[name] = _row_score(identity, [sums], [counts])
    return scored


def perplexity(name: str, terms: Scored) -> Scored:
    """The exponential of the term `nll`, called `name`; None without that term."""
    nll, by_row = terms.scores.get("nll"), terms.by_row.get("nll")
    value = None if nll is None else math.exp(min(nll, 700))
    return Scored({name: value}, {name: {**by_row, "exponential": True}} if by_row else {})


def terms_by_row(examples: Sequence[Any], counts: Counts, batches: Sequence[Batch]) -> RowScores:
    """Each term of a loss by row, and `loss`, their weighted sum, from the batches of all examples in any order.

    Pieces of one text are one row. What a method gives as a sum only is left out.
    """
    order, terms = [k for batch, _ in batches for k in batch], batches[0][1] if batches else {}
    _, rows = np.unique([example.id for example in examples], return_inverse=True)
    found, identity = RowScores(), short_hash(repr(examples))
    for name, term in terms.items():
        values = torch.cat([part[name].values.reshape(-1) for _, part in batches if name in part])
        if len(values) == len(order):
            sizes = [counts(example).get(term.per, 0) for example in examples]
            sums, counted = (np.bincount(rows, weights=column) for column in (values[np.argsort(order)], sizes))
            found[name] = _row_score(identity, [sums.tolist()], [counted.tolist()])
    weights = {name: term.weight for name, term in terms.items() if term.weight}
    if weights and weights.keys() <= found.keys():
        parts = [(weight * np.array(found[name]["sums"][0])).tolist() for name, weight in weights.items()]
        found["loss"] = _row_score(identity, parts, [found[name]["counts"][0] for name in weights])
    return found


def _row_score(rows: str, sums: list[list[float]], counts: list[list[float]]) -> RowScore:
    return RowScore(rows=rows, sums=sums, counts=counts, exponential=False)
