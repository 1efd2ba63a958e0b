"""The page of votes: what there is to vote on, the next two answers, what was said of them."""

from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import urlencode

from ftcore.data.feedback import PAIRED, Choice, Feedback, Pair, Purpose
from ftcore.errors import DataError
from ftcore.evaluate.preferences import agreement, compared_authors, counts, preferred, raters
from ftcore.run_folder import Run
from ftcore.runs.queue import Job, Queue
from ftcore.ui import charts

FEW = 10  # pairs that are left when more answers are written
BLOCK = 40  # prompts that they are written to
# Choice -> what the button says, its key, and whether it is of two answers.
CHOICES: dict[Choice, tuple[str, str, bool]] = {
    "left": ("Left is better", "1 arrowleft", True), "right": ("Right is better", "2 arrowright", True),
    "tie": ("Equally good", "3", True), "both_bad": ("Both bad", "4", True), "good": ("Good", "1", False),
    "bad": ("Bad", "2", False),
    "skip": ("Skip", "s", True),
}  # fmt: skip
PRIVATE = "This is of a private run: start the page with show_private=true to see it."
SESSION = ("rater", "purpose", "first", "second")


class Booth:
    """Where votes are given. Reading and writing them is the store's."""

    def __init__(self, store: Feedback, queue: Queue) -> None:
        self.store, self.queue = store, queue

    def overview(self, visible: Callable[[str], bool]) -> dict[str, Any]:
        """What there is to vote on and what was said: win-rates, who prefers a side, who agrees."""
        votes, authors = self.store.votes(), self.store.authors()
        wins = [
            (first, second, won := preferred(votes, first, second), _interval(won))
            for first, second in compared_authors(votes)
        ]
        took = {rater: found for rater, found in raters(votes).items() if found["votes"]}
        shown = {author: found for author, found in authors.items() if visible(author)}
        runs = [self.store.author(run) for run in Run.below(self.store.folder) if run.model.is_dir()]
        return {
            "counts": counts(votes),
            "wins": wins,
            "raters": took,
            "agreement": agreement(votes),
            "authors": shown,
            "runs": runs,
        }

    def next(self, session: Mapping[str, str], visible: Callable[[str], bool]) -> dict[str, Any]:
        """The next answers for a rater, with the sides hidden. Raises `DataError` for a session that lacks something."""
        first, second = session.get("first", ""), session.get("second") or None
        purpose, rater = cast(Purpose, session.get("purpose", "")), session.get("rater", "").strip()
        if not rater or not first or purpose not in ("teach", "measure"):
            raise DataError("Say who you are, what the votes are for and whose answers to look at.")
        if not all(visible(author) for author in (first, second) if author):
            raise DataError(PRIVATE)
        found = self.store.next_pair(rater, purpose, first, second)
        left = found[1] if found else 0
        if purpose == "teach" and left < FEW:
            self._write_more({first, second or first})
        kept = {key: session.get(key, "") for key in SESSION}
        state = preferred(self.store.votes(), first, second) if second and purpose == "measure" else None
        context: dict[str, Any] = {
            "session": kept,
            "left": left,
            "state": state,
            "pair": None,
            "writing": self._writing(),
        }
        if not found:
            return context
        prompt, one, other, _, run = self.store.texts(found[0])
        if run and not visible(run):
            raise DataError(PRIVATE)
        choices = [
            (choice, *shown[:2]) for choice, shown in CHOICES.items() if shown[2] == bool(second) or choice == "skip"
        ]
        return {
            **context,
            "pair": found[0],
            "prompt": prompt,
            "answers": [one, other] if second else [one],
            "choices": choices,
        }

    def vote(self, form: Mapping[str, str]) -> str:
        """Keep a vote; the next page comes when it is on the disk."""
        pair, choice = _pair(form), cast(Choice, form.get("choice", ""))
        if choice.startswith("edit"):  # a correction is of one answer
            pair = Pair(pair.prompt, pair.right if choice == "edit right" and pair.right else pair.left, None)
            choice = "edit"
        if choice not in (*PAIRED, "good", "bad", "edit", "skip"):
            raise DataError("This is no vote.")
        text = form.get("text", "").strip() or None
        self.store.vote(
            form.get("rater", ""),
            pair,
            choice,
            text if choice == "edit" else None,
            form.get("note", "").strip() or None,
        )
        return _again(form)

    def undo(self, form: Mapping[str, str]) -> str:
        """Take back the last vote of a rater."""
        self.store.undo(form.get("rater", ""))
        return _again(form)

    def add_prompts(self, form: Mapping[str, str]) -> str:
        """Take in prompts, one a line."""
        self.store.add_prompts(line.strip() for line in form.get("prompts", "").splitlines() if line.strip())
        return "/feedback"

    def write_answers(self, run: Run, count: int) -> Job:
        """Let a run's model write answers to prompts, when no job trains."""
        words = ["feedback", f"run={run}", f"answers={min(max(count, 1), 1000)}", f"output_dir={self.store.folder}"]
        return self.queue.add("answers", f"answers of {self.store.author(run)}", words)

    def _writing(self) -> bool:
        return any(job.kind == "answers" and job.state in ("queued", "running") for job in self.queue.jobs())

    def _write_more(self, authors: set[str]) -> None:
        """See to it that nobody waits for a model: the next answers are written before the last ones are voted on."""
        if self._writing():
            return
        for author in sorted(authors):
            run = Run(self.store.folder / author)
            if run.model.is_dir() and self.store.unanswered(author, 1, 2):
                self.write_answers(run, BLOCK)


def _pair(form: Mapping[str, str]) -> Pair:
    numbers = [form.get(name, "") for name in ("prompt", "left", "right")]
    if not all(number.isdecimal() for number in numbers[:2]) or not (numbers[2].isdecimal() or not numbers[2]):
        raise DataError("This vote does not say what it is about.")
    return Pair(int(numbers[0]), int(numbers[1]), int(numbers[2]) if numbers[2] else None)


def _again(form: Mapping[str, str]) -> str:
    return f"/vote?{urlencode({key: form.get(key, '') for key in SESSION})}"


def _interval(won: Mapping[str, Any]) -> Any:
    return charts.whisker(won["low"], won["high"], won["rate"], 0.5, (0.0, 1.0)) if won["rate"] is not None else ""
