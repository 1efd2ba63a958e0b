"""What the votes of a store (data/feedback.py) say: which of two models is preferred, who prefers a side, who agrees."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from ftcore.data.feedback import PAIRED, SCORE
from ftcore.evaluate.win_rate import Sides, WinRate, sides, win_rate

Votes = Iterable[Mapping[str, Any]]


class Agreement(TypedDict):
    """Pairs of answers that several people have voted on, and how many of these all have voted on alike."""

    pairs: int
    agreed: int


def preferred(votes: Votes, first: str, second: str) -> WinRate:
    """How often the first author's answers to held-out prompts are preferred to the second's.

    Only the first vote on a prompt counts: a further one is not a further draw of prompts, for which the limits hold.
    """
    seen, scores = set[int](), list[float]()
    for vote in votes:
        authors = (vote["left_author"], vote["right_author"])
        measures = vote["purpose"] == "measure" and vote["choice"] in PAIRED and vote["prompt"] not in seen
        if measures and authors in ((first, second), (second, first)):
            seen.add(vote["prompt"])
            score = SCORE[vote["choice"]]
            scores.append(score if authors[0] == first else 1 - score)
    return win_rate(scores)


def compared_authors(votes: Votes) -> list[tuple[str, str]]:
    """The pairs of authors that were compared on held-out prompts, each once."""
    pairs = (
        sorted((vote["left_author"], vote["right_author"]))
        for vote in votes
        if vote["purpose"] == "measure" and vote["choice"] in PAIRED and vote["left_author"] != vote["right_author"]
    )
    return list(dict.fromkeys((one, other) for one, other in pairs))


def raters(votes: Votes) -> dict[str, Sides]:
    """Rater -> how often they took the left side."""
    took: dict[str, list[bool]] = defaultdict(list)
    for vote in votes:
        took[vote["rater"]] += [vote["choice"] == "left"] if vote["choice"] in ("left", "right") else []
    return {rater: sides(left) for rater, left in took.items()}


def agreement(votes: Votes) -> Agreement:
    """Whether people who saw the same two answers said the same of them, whatever side these were on."""
    said: dict[tuple[int, int], dict[str, Any]] = defaultdict(dict)
    for vote in votes:
        if vote["choice"] in PAIRED:
            better = {"left": vote["left_id"], "right": vote["right_id"]}.get(vote["choice"], vote["choice"])
            one, other = sorted((vote["left_id"], vote["right_id"]))
            said[one, other][vote["rater"]] = better
    several = [set(words.values()) for words in said.values() if len(words) > 1]
    return Agreement(pairs=len(several), agreed=sum(len(words) == 1 for words in several))


def counts(votes: Votes) -> dict[str, int]:
    """What there is to train on: pairs with a better answer, labels, corrections; and votes that measure."""
    found = dict.fromkeys(("pairs", "labels", "corrections", "measuring"), 0)
    kinds = {
        "left": "pairs",
        "right": "pairs",
        "both_bad": "labels",
        "good": "labels",
        "bad": "labels",
        "edit": "corrections",
    }
    for vote in votes:
        kind = "measuring" if vote["purpose"] == "measure" else kinds.get(vote["choice"])
        if kind:
            found[kind] += 1
    return found
