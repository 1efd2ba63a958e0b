"""All runs of an output folder: what each was made from, its scores, what people said of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from ftcore.data.feedback import Feedback
from ftcore.errors import ConfigError
from ftcore.evaluate.intervals import Interval
from ftcore.evaluate.preferences import preferred
from ftcore.evaluate.tables import SCORES
from ftcore.evaluate.win_rate import WinRate
from ftcore.run_folder import Run, Summary

# The score that stands for a run: the first of these that it has.
MAIN = ("accuracy", "cloze", "rewards/accuracies", "reward", "loss")


@dataclass(frozen=True)
class Change:
    """A score of base and tuned model and, where it is known, the interval of the difference."""

    key: str
    base: float
    tuned: float
    interval: Interval | None

    @property
    def label(self) -> str:
        """The score's name."""
        return SCORES[self.key].label

    def __str__(self) -> str:
        form = SCORES[self.key].form
        return f"{form.format(self.base)} -> {form.format(self.tuned)}"


@dataclass(frozen=True)
class Entry:
    """A run in the list of all.

    Args:
        place: its folder, below the output folder.
        depth: how many runs it comes from, one after the other.
        state: done, failed, running, or stopped.
        parents: places of the runs that it was made from.
        rows: training rows.
        change: its main score.
        forgotten: the perplexity on general text, base and tuned.
        wins: how often people prefer its answers to those of the model it began with.
    """

    place: str
    name: str
    started: str
    depth: int
    state: str
    parents: tuple[str, ...]
    method: str
    rows: int | None
    change: Change | None
    forgotten: Change | None
    wins: WinRate | None
    seconds: float | None
    private: bool


def history(folder: Path) -> list[Entry]:
    """All runs below a folder, the newest first, but each run right below the one that it was made from."""
    votes = Feedback(folder).votes()
    found = {entry.place: entry for run in Run.below(folder) if (entry := entry_of(run, folder, votes))}
    newest = sorted(found.values(), key=lambda entry: (entry.started, entry.place), reverse=True)
    parents = {entry.place: next((place for place in entry.parents if place in found), None) for entry in newest}
    children: dict[str | None, list[Entry]] = {}
    for entry in newest:
        children.setdefault(parents[entry.place], []).append(entry)
    seen = set[str]()
    roots = [*children.get(None, []), *newest]  # what no root leads to is in a circle, or below one
    return [one for entry in roots for one in _tree(entry, children, 0, seen)]


def _tree(entry: Entry, children: Mapping[str | None, list[Entry]], depth: int, seen: set[str]) -> Iterator[Entry]:
    """An entry and what was made from it, as far as it was not seen."""
    if entry.place not in seen:
        seen.add(entry.place)
        yield replace(entry, depth=depth)
        for child in children.get(entry.place, ()):
            yield from _tree(child, children, depth + 1, seen)


def entry_of(run: Run, folder: Path, votes: list[dict[str, Any]]) -> Entry | None:
    """What the list says of a run; None where its config cannot be read."""
    entry = _made(run.folder, folder, run.changed)
    if entry and not entry.state:
        entry = replace(entry, state=state_of(run, None))
    return replace(entry, wins=_wins(entry, votes)) if entry and votes else entry


def _wins(entry: Entry, votes: list[dict[str, Any]]) -> WinRate | None:
    """How often a run is preferred to what it began with, which is the run that it was made from where there is one."""
    base, before = f"{entry.place}/base", {*entry.parents}
    found = []
    for vote in votes:
        sides = [base if vote[side] in before else vote[side] for side in ("left_author", "right_author")]
        if set(sides) == {entry.place, base}:
            found.append({**vote, "left_author": sides[0], "right_author": sides[1]})
    return preferred(found, entry.place, base) if found else None


@lru_cache(maxsize=10_000)
def _made(path: Path, folder: Path, changed: tuple[float, ...]) -> Entry | None:
    """The entry of a run whose files are as they were then, without votes; its state is "" until it has ended."""
    run = Run(path)
    config, summary = _read(run)
    if not isinstance(config, Mapping) or not isinstance(choices := config.get("choices"), Mapping):
        return None
    place, known = place_of(run.folder, folder), summary or Summary()
    rows = known.score("data_rows")
    return Entry(
        place=place,
        name=str(config.get("name")),
        started=" ".join([run.started[0][:10], run.started[0][11:].replace("-", ":")]).strip(),
        depth=0,
        state=state_of(run, summary) if summary is not None else "",
        parents=tuple(place_of(parent, folder) for parent in _parents(run, known)),
        method=str(choices.get("method")),
        rows=int(rows) if rows is not None else None,
        change=next((change for key in MAIN if (change := change_of(known, key))), None),
        forgotten=change_of(known, "probe_perplexity"),
        wins=None,
        seconds=known.score("seconds"),
        private=bool(config.get("private")),
    )


def state_of(run: Run, summary: Summary | None) -> str:
    """done, failed, running, or stopped."""
    if summary is not None:
        return "failed" if summary.get("failure") else "done"
    return "running" if run.process else "stopped"


def change_of(summary: Summary, key: str) -> Change | None:
    """A score of both models; None where one has none."""
    base, tuned = summary.side("base").get(key), summary.side("tuned").get(key)
    if base is None or tuned is None:
        return None
    intervals = cast(Mapping[str, Interval], summary.get("intervals") or {})
    return Change(key, base, tuned, intervals.get(key))


def _parents(run: Run, summary: Summary) -> list[Path]:
    """Folders of the runs that a run was made from, those that are gone too."""
    if "parents" in summary:
        return [Path(str(parent["run"])) for parent in cast(list[Mapping[str, str]], summary["parents"])]
    return [parent.folder for parent in run.parents]


def place_of(path: Path, folder: Path) -> str:
    """A folder as it is called below the output folder, also when that has moved; or its whole path."""
    place, root = path.resolve(), folder.resolve()
    if place.is_relative_to(root):
        return str(place.relative_to(root))
    moved = "/".join(place.parts[-2:])
    return moved if (root / moved).is_dir() else str(place)


def _read(run: Run) -> tuple[Any, Summary | None]:
    try:
        return run.config, run.summary
    except ConfigError:  # half a file
        return run.config, None
