"""The next cycle: a run on the votes, asked for in three fields, checked and planned before it can be queued."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from ftcore.config.build import record_type
from ftcore.config.compose import load_config
from ftcore.config.options import options
from ftcore.console import typed
from ftcore.data.feedback import Feedback
from ftcore.data.votes import EXPORT
from ftcore.errors import ConfigError, DataError
from ftcore.evaluate.preferences import counts
from ftcore.run_folder import Run
from ftcore.runs.queue import Queue

# What most votes are -> the method that is proposed. dpo takes corrections too, and learns less of them than sft does.
PROPOSED = {"pairs": "dpo", "labels": "kto", "corrections": "sft"}
# Record type of a method -> the kinds of votes that it can be trained on.
USES = {
    "preference": ("pairs", "corrections"), "unpaired": ("pairs", "labels", "corrections"),
    "prompt_completion": ("corrections", "labels"),
}  # fmt: skip
FOUNDATION = "a foundation model"  # what a first run goes on from
FEWEST = 4  # votes
VOTES = "votes"  # folder of what was trained on, below the output folder


class Cycles:
    """Cycles that were asked for, each checked in the background."""

    def __init__(self, folder: Path, queue: Queue) -> None:
        self.folder, self.queue, self.numbers = folder, queue, count(1)
        self.pool = ThreadPoolExecutor(1)
        self.asked: dict[int, tuple[dict[str, Any], Future[dict[str, Any]]]] = {}

    def form(self, store: Feedback, place: str) -> dict[str, Any]:
        """Runs to go on from, what the votes are, and the methods that can use them."""
        runs = [run for run in Run.below(self.folder) if run.finished and run.model.is_dir()]
        places = [store.author(run) for run in sorted(runs, key=lambda run: run.started, reverse=True)]
        if place not in (*places, FOUNDATION):
            place = next(iter(places), FOUNDATION)
        found, first = counts(store.votes()), place == FOUNDATION
        kinds = {kind: found[kind] for kind in PROPOSED if found[kind] and not first}
        proposed = PROPOSED[max(kinds, key=lambda kind: kinds[kind])] if kinds else "sft"
        return {
            "counts": found, "methods": options("method") if first else _enough(found), "proposed": proposed, "first": first,
            "runs": [*places, FOUNDATION], "chosen": place, "name": "first" if first else _next_name(self.folder, place),
            "fewest": FEWEST, "data": options("data") if first else [], "models": options("model") if first else [],
            "usual": load_config([])["choices"],
        }  # fmt: skip

    def check(self, run: Run | None, form: Mapping[str, str]) -> int:
        """Begin to check a cycle from a run, or from a foundation; returns its number.

        Raises `ConfigError` for fields that say nothing usable.
        """
        method, name = form.get("method", ""), form.get("name", "").strip()
        if method not in (methods() if run else options("method")):
            raise ConfigError("Choose a method: one that the votes can be used by.")
        if not re.fullmatch(r"[\w.-]{1,60}", name) or name.startswith("."):
            raise ConfigError("A name has up to 60 letters, digits, dots and hyphens.")
        numbers = {key: form.get(field, "").strip() for key, field in (("max_epochs", "passes"), ("method.lr", "lr"))}
        given = [f"{key}={_number(key, value)}" for key, value in numbers.items() if value]
        fields = [f"method={method}", f"output_dir={self.folder}", f"name={name}", *given]
        if not run:  # a name of an option, which the check refuses if there is none
            fields += [f"{group}={form.get(group, '')}" for group in ("data", "model")]
        number, source = next(self.numbers), run.folder.parent.name if run else form.get("model", "")
        asked = {"source": source, "method": method, "name": name}
        self.asked[number] = (asked, self.pool.submit(_checked, self.folder, run, name, fields))
        return number

    def checked(self, number: int) -> dict[str, Any]:
        """What is known of a cycle that was asked for."""
        if number not in self.asked:
            raise DataError("This cycle was asked for before the page was started anew: ask again.")
        asked, future = self.asked[number]
        return {"number": number, "asked": asked, "result": _result(future) if future.done() else None}

    def start(self, form: Mapping[str, str]) -> str:
        """Queue a cycle that was checked. Raises `DataError` for one that was not, or is not right."""
        number = int(form["number"]) if form.get("number", "").isdigit() else 0
        result = self.checked(number)["result"]
        if not result or result["problem"]:
            raise DataError("Only what was checked and found right can be started.")
        return f"/jobs/{self.queue.add('train', self.asked[number][0]['name'], result['words']).number}"


def _enough(found: Mapping[str, int]) -> list[str]:
    """The methods for which there are votes enough."""
    return [name for name, kind in methods().items() if sum(found.get(use, 0) for use in USES[kind]) >= FEWEST]


@cache
def methods() -> dict[str, str]:
    """Methods that votes can be used by -> their record type."""
    nodes = {name: load_config([f"method={name}", "data.path=null"])["method"] for name in options("method")}
    kinds = {name: record_type(node) for name, node in nodes.items()}
    return {name: kind for name, kind in kinds.items() if kind in USES and name != "reward"}


def _checked(folder: Path, run: Run | None, name: str, fields: Sequence[str]) -> dict[str, Any]:
    """Export the votes, then check and plan the run on them, by the commands that a user would type."""
    words, exported = list(fields), {}
    if run:
        votes = folder / VOTES / name / EXPORT
        exported = ask("feedback", f"run={run}", *fields[:2], f"to={votes}")
        words = [f"run={run}", f"model.path={run}", "data=feedback", f"data.path={votes}", *fields]
        words += [f"data.splits.test={exported['held_out']}"] if exported.get("held_out") else []
    checked = ask("check", *words)
    plan = ask("plan", *words, may_fail=True)
    shown = yaml.safe_dump(checked["config"], sort_keys=False)
    return {"problem": "", "words": words, "votes": exported, "config": shown, "plan": plan}


def _result(future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        result = future.result()
        return {**result, "command": typed("python", "-m", "ftcore", *result["words"])}
    except ConfigError as error:
        return {"problem": str(error), "words": []}


def ask(verb: str, *words: str, may_fail: bool = False) -> dict[str, Any]:
    """The answer of a verb, in JSON. Raises `ConfigError` with what it says is wrong."""
    command = [sys.executable, "-m", "ftcore", verb, *words, "json=true"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}
    )
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        if may_fail:
            return {}
        raise ConfigError(done.stderr.strip()[-4000:] or f"{verb} ended with exit status {done.returncode}.") from None


class Inspected:
    """What `inspect` found of the rows of runs, asked for in the background."""

    def __init__(self) -> None:
        self.pool, self.found = ThreadPoolExecutor(1), dict[Path, Future[dict[str, Any]]]()

    def answer(self, run: Run) -> dict[str, Any] | str | None:
        """Its answer, what is wrong with the rows, or None while it reads them."""
        future = self.found.get(run.folder)
        if future is None:
            future = self.found[run.folder] = self.pool.submit(ask, "inspect", f"run={run}")
        if not future.done():
            return None
        try:
            return future.result()
        except ConfigError as error:
            del self.found[run.folder]
            return str(error)


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{key} is a number, such as 2 or 1e-5.") from None


def _next_name(folder: Path, place: str) -> str:
    """A name that no run has yet: that of the run before with the next number."""
    stem = re.sub(r"-cycle\d+$", "", place.split("/")[0] or "cycle")
    return next(name for k in count(1) if not (folder / (name := f"{stem}-cycle{k}")).exists())
