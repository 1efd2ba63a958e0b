"""What each page shows, from the files of runs; the templates lay it out, in the browser and in reports alike."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ftcore.config.tree import differing
from ftcore.config.words import words_of
from ftcore.console import printable, typed
from ftcore.data.feedback import Feedback
from ftcore.errors import FtcoreError
from ftcore.evaluate.history import Entry, change_of, entry_of, history, place_of, state_of
from ftcore.evaluate.intervals import Interval
from ftcore.evaluate.series import Series, series
from ftcore.evaluate.tables import SCORES, change_text, intervals, verdict
from ftcore.run_folder import Run, Scores, Summary
from ftcore.ui import charts

PER_PAGE = 25  # samples
LONGEST = 4_000  # characters of a text that a page shows
FIRST = ("loss", "nll", "retention", "rise", "lr", "tokens_per_second", "grad_norm")  # charts, in this order
UNSHOWN = {"tokens"}
SORTS = {
    "": "cycles", "newest": "newest", "score": "best score", "forgotten": "least forgotten", "seconds": "fastest", "name": "name",
}  # fmt: skip
SHOWS = {"": "all answers", "changed": "changed", "better": "got better", "worse": "got worse"}


def templates() -> Environment:
    """The templates, in which every text is text: no markup, no control character, none without end."""
    loader = PackageLoader("ftcore.ui", "templates")
    made = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_text
    )
    made.filters |= {"number": charts.number, "command": lambda words: typed("python", "-m", "ftcore", *words)}
    return made


def _text(value: object) -> object:
    if type(value) is not str:
        return "" if value is None else value
    return printable(value if len(value) <= LONGEST else f"{value[:LONGEST]} ... ({len(value):,} characters)")


class Line(NamedTuple):
    """A score of two models."""

    label: str
    first: str
    second: str
    change: str
    verdict: str
    whisker: Markup


def score_lines(first: Scores, second: Scores, found: Mapping[str, Interval]) -> list[Line]:
    """The scores that both models have, with the change, its interval and what it means."""
    lines = []
    for key, style in SCORES.items():
        a, b, one = first.get(key), second.get(key), found.get(key)
        if a is not None and b is not None:
            texts = (style.form.format(a), style.form.format(b), change_text(key, a, b, one), verdict(one))
            lines.append(Line(style.label, *texts, whisker(one, b - a)))
    return lines


def whisker(found: Interval | None, value: float) -> Markup:
    """An interval of a difference as a picture."""
    if not found:
        return Markup("")
    reach = max(abs(found["low"]), abs(found["high"])) * 1.1 or 1.0
    return charts.whisker(found["low"], found["high"], value, 0.0, (-reach, reach))


# Runs.


def runs(folder: Path, query: Mapping[str, str]) -> dict[str, Any]:
    """All runs: filtered by words and method, as a tree of cycles or sorted."""
    entries, sort = history(folder), query.get("sort", "")
    words, method = query.get("q", "").lower().split(), query.get("method", "")
    shown = [entry for entry in entries if all(word in f"{entry.place} {entry.state}".lower() for word in words)]
    shown = [entry for entry in shown if method in ("", entry.method)]
    flat = sort in SORTS and sort != ""
    sweeps = sorted(str(file.parent.relative_to(folder)) for file in folder.glob("*/sweep-*/sweep.json"))
    shown = sorted(shown, key=_orders(sort)) if flat else shown
    lines = [(entry, 0 if flat else min(entry.depth, 6), _whisker_of(entry)) for entry in shown]
    methods = sorted({entry.method for entry in entries})
    chosen = {"q": query.get("q", ""), "method": method, "sort": sort}
    found = {"lines": lines, "sweeps": sweeps, "methods": methods, "all": len(entries), "folder": str(folder)}
    return {**found, "sorts": SORTS, "chosen": chosen}


def _orders(sort: str) -> Any:
    """By what runs are sorted; those without it come last."""
    last = float("inf")
    return {
        "newest": lambda e: [-ord(letter) for letter in e.started],
        "score": lambda e: -e.change.tuned if e.change and SCORES[e.change.key].better == "higher" else last,
        "forgotten": lambda e: e.forgotten.tuned / e.forgotten.base if e.forgotten else last,
        "seconds": lambda e: e.seconds if e.seconds is not None else last,
        "name": lambda e: e.place,
    }[sort]


def _whisker_of(entry: Entry) -> Markup:
    return whisker(entry.change.interval, entry.change.tuned - entry.change.base) if entry.change else Markup("")


# One run.


def pictures(found: Series) -> list[Markup]:
    """A chart for each measure, training and validation in one."""
    names: dict[str, dict[str, charts.Line]] = defaultdict(dict)
    for key, line in found.columns.items():
        part, _, name = key.partition("/")
        if (name or part) not in UNSHOWN:
            names[name if part in ("train", "val") else key]["validation" if part == "val" else "training"] = line
    order = sorted(names, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    return [charts.lines(name.replace("_", " "), names[name]) for name in order]


def live(run: Run) -> dict[str, Any]:
    """What moves while a run trains."""
    found, steps = series(run.metrics_file), run.beginning.get("steps")
    found.update()
    step, each = found.columns["train/loss"][0][-1:] or [0], found.seconds_a_step()
    left = round(each * (steps - step[0])) if each and isinstance(steps, int) and steps > step[0] else None
    return {
        "step": int(step[0]), "steps": steps, "left": left, "speed": found.last("train/tokens_per_second"),
        "loss": found.last("train/loss"), "pictures": pictures(found), "state": state_of(run, run.summary),
    }  # fmt: skip


def one_run(run: Run, folder: Path, query: Mapping[str, str], children: Sequence[str] = ()) -> dict[str, Any]:
    """All that is known of a run, and the places of those that were made from it."""
    summary: Mapping[str, Any] = run.summary or {}
    config: Mapping[str, Any] = run.config or {}
    base, tuned, found = (summary.get(key) or {} for key in ("base", "tuned", "intervals"))
    chosen = {key: query.get(key, "") for key in ("q", "show", "page")}
    entry = entry_of(run, folder, Feedback(folder).votes())
    return {
        "run": run, "place": place_of(run.folder, folder), "entry": entry, "summary": summary, "children": children,
        "scores_lines": score_lines(base, tuned, found),
        "rows": tuned.get("rows"), "live": live(run), "samples": samples(run.samples(), chosen), "names": ("base", "tuned"),
        "first_batch": run.beginning.get("first_batch", []), "command": _command(run.folder, run.config_file.stat().st_mtime),
        "config": yaml.safe_dump(dict(config), sort_keys=False), "chosen": chosen, "shows": SHOWS,
    }  # fmt: skip


def samples(rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, str], most: int = PER_PAGE) -> dict[str, Any]:
    """The answers that the filter and the words leave, one page of them."""
    words = chosen["q"].lower().split()
    kept = [row for row in rows if _shown(row, chosen["show"])]
    kept = [row for row in kept if all(word in " ".join(map(str, row.values())).lower() for word in words)]
    pages = max(-(-len(kept) // most), 1)
    page = min(int(chosen["page"]) if chosen["page"].isdigit() else 1, pages) or 1
    return {
        "rows": kept[(page - 1) * most : page * most],
        "count": len(kept),
        "all": len(rows),
        "page": page,
        "pages": pages,
    }


def _shown(row: Mapping[str, Any], show: str) -> bool:
    before, after = row.get("base_right"), row.get("tuned_right")
    changed = row.get("base") != row.get("tuned") or before != after
    return {
        "changed": changed,
        "better": after is True and before is False,
        "worse": before is True and after is False,
    }.get(show, True)


@lru_cache(maxsize=64)
def _command(folder: Path, changed: float) -> str:
    """The command that makes such a run again: options, and the keys that differ from theirs."""
    config = Run(folder).config
    try:
        return typed("python", "-m", "ftcore", *words_of(config)) if config else ""
    except (FtcoreError, KeyError, TypeError):  # of another version
        return typed("python", "-m", "ftcore", f"run={folder}")


# Two runs.


def compare(first: Run, second: Run, folder: Path, query: Mapping[str, str]) -> dict[str, Any]:
    """Two tuned models on the held-out rows that both were scored on; the keys in which their configs differ; their answers."""
    one, other = ((run.summary or Summary()).side("tuned") for run in (first, second))
    found = intervals(first.row_scores(), second.row_scores())
    chosen = {key: query.get(key, "") for key in ("q", "show", "page")}
    names = (place_of(first.folder, folder), place_of(second.folder, folder))
    return {
        "scores_lines": score_lines(one, other, found), "names": names, "rows": other.get("rows"), "shows": SHOWS,
        "differing": differing(first.config or {}, second.config or {}),
        "samples": samples(_joined(first, second), chosen), "chosen": chosen, "same_rows": bool(found),
    }  # fmt: skip


def _joined(first: Run, second: Run) -> list[dict[str, Any]]:
    """The tuned models' answers of two runs to the same rows."""
    others = {row["id"]: row for row in second.samples()}
    return [
        {**row, **other, "base": row.get("tuned"), "base_right": row["tuned_right"]}
        for row in first.samples()
        if (other := others.get(row["id"]))
    ]


# A sweep.


def sweep(folder: Path) -> dict[str, Any]:
    """A sweep's table, its settings with intervals against the best, and plots of an objective that compares them."""
    content = orjson.loads((folder / "sweep.json").read_bytes())
    jobs: list[dict[str, Any]] = content.get("jobs", [])
    changed = list(dict.fromkeys(key for job in jobs for key in job["changes"]))
    objective = content.get("objective") if content.get("comparable", True) else "tuned.accuracy"
    summaries = {job["job"]: Summary(job["summary"]) for job in jobs}
    scored = [(job, value) for job in jobs if (value := summaries[job["job"]].score(str(objective))) is not None]
    points = {key: [(str(job["changes"].get(key, "")), y, f"job {job['job']}") for job, y in scored] for key in changed}
    plots = [charts.dots(f"{objective} by {key}", dots) for key, dots in points.items() if dots]
    sides = {number: _sides(summary) for number, summary in summaries.items()}
    shown = {"sweep": content, "name": "/".join(folder.parts[-2:]), "changed": changed, "jobs": jobs}
    return {**shown, "sides": sides, "plots": plots}


def _sides(summary: Summary) -> list[tuple[str, str]]:
    """Label and "base -> tuned" of the scores that stand for a run."""
    keys = ("accuracy", "rewards/accuracies", "reward", "loss", "probe_perplexity")
    return [(change.label, str(change)) for key in keys if (change := change_of(summary, key))]


def data(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What `inspect` found."""
    return {
        "found": answer,
        "lengths": charts.bars("tokens a row", [(label, count) for label, count in answer["bins"]]),
    }
