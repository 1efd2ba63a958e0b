"""The folder of a run. `Run(folder)` alone knows the names of its files, and reads and writes them.

config.yaml (what ran, without what belongs to the command alone), weights.json (hashes of the base weights), beginning.json
(number of steps, first batch), metrics.jsonl (a line for each optimizer step), checkpoints/, base.json (the base model's scores),
model/ (the tuned weights in Hugging Face layout), samples.jsonl, row_scores.jsonl (the tuned model's scores by row) and, written
last, summary.json; where asked for ledger.parquet, profile.txt and profile.json.
"""

import json
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TypedDict, cast

import yaml

from ftcore.errors import ConfigError, ModelError, StorageError
from ftcore.files import expanded, write_json, write_lines, write_text
from ftcore.settings import Config

Scores = dict[str, float | None]
Row = dict[str, object]
# The safe loader, in C where PyYAML has it: ten times as fast.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_ALIASES = 20  # of an earlier run's config.yaml; 2^20 leaves at most
# Names of new folders, with "-2" and so on for further ones of the same second.
TIME = "%Y-%m-%d_%H-%M-%S"
STARTED = re.compile(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)(?:-(\d+))?")
OWNER = re.compile(r"process (\d+) on (.+) since (\S+)")
PARTIAL = ".partial"  # ends the name of a folder whose run is not finished: a stage's


class RowScore(TypedDict):
    """A score by row: the sum over T terms of sums / counts over all R rows, or the exponential of that.

    `rows` is a hash of what the rows hold: scores that share it are of the same rows in the same order.
    """

    rows: str
    sums: list[list[float]]  # (T, R)
    counts: list[list[float]]  # (T, R)
    exponential: bool


RowScores = dict[str, RowScore]


class Summary(dict[str, object]):
    """summary.json."""

    def side(self, name: str) -> Scores:
        """The scores of `base` or `tuned`; {} when they were not compared."""
        return cast(Scores, self.get(name) or {})

    def number(self, key: str) -> float:
        """A number that every run has."""
        return cast(float, self[key])

    def score(self, key: str) -> float | None:
        """The number under a dotted key; None when there is none."""
        found: object = self
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found if isinstance(found, int | float) else None


class Run:
    """A run, by its folder."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = expanded(folder)
        self.model = self.folder / "model"
        self.checkpoints = self.folder / "checkpoints"
        self.base_scores = self.folder / "base.json"
        self.ledger = self.folder / "ledger.parquet"
        self.profile_table = self.folder / "profile.txt"
        self.profile_trace = self.folder / "profile.json"
        self.lock = self.folder / ".lock"
        self.slurm = self.folder / "slurm"
        self.config_file = self.folder / "config.yaml"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.exports = self.folder / "export"
        self._summary = self.folder / "summary.json"
        self._beginning = self.folder / "beginning.json"
        self._samples = self.folder / "samples.jsonl"
        self._row_scores = self.folder / "row_scores.jsonl"
        self._weights = self.folder / "weights.json"
        self._first_config = self.folder / "config.first.yaml"

    def __str__(self) -> str:
        return str(self.folder)

    # Which folders are runs.

    @classmethod
    def below(cls, folder: Path) -> list["Run"]:
        """All runs in a folder, sorted by path; links are not followed, and no run lies in another."""
        found = []
        for place, folders, files in os.walk(folder):
            if "config.yaml" in files and not (Path(place) / "config.yaml").is_symlink():
                found.append(cls(place))
                folders.clear()
        return sorted(found, key=lambda run: run.folder)

    @classmethod
    def named(cls, folder: Path) -> list["Run"]:
        """The runs right below a folder, the newest first."""
        runs = [cls(file.parent) for file in folder.glob("*/config.yaml")]
        return sorted(runs, key=lambda run: (*run.started, run.name), reverse=True)

    @classmethod
    def at(cls, path: object) -> "Run | None":
        """The run with a model that a path is the folder of; None when it is none."""
        run = cls(path) if isinstance(path, str) else None
        return run if run and run.model.is_dir() and run.config_file.is_file() else None

    def best_weights(self, step: int) -> Path:
        """Folder of the trained weights of the best validation, which was at `step`."""
        return self.checkpoints / f"best-{step:08d}"

    @property
    def begun(self) -> bool:
        """Whether the folder is that of a run at all."""
        return self.config_file.is_file()

    @property
    def changed(self) -> tuple[float, ...]:
        """When its config and its summary were written: what was read of them serves as long as this is the same."""
        return tuple(file.stat().st_mtime if file.is_file() else 0.0 for file in (self.config_file, self._summary))

    @property
    def started(self) -> tuple[str, int]:
        """When it was begun, by its folder's name: the time, and its number among those of that second."""
        found = STARTED.fullmatch(self.name)
        return (found[1], int(found[2] or 1)) if found else ("", 0)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end, and a good one."""
        return bool((summary := self.summary) is not None and not summary.get("failure"))

    @property
    def name(self) -> str:
        """The folder's name; a stage that is being made has the one that it gets next."""
        return self.folder.name.removesuffix(PARTIAL)

    @property
    def final_folder(self) -> Path:
        """Where the folder is once the run is finished."""
        return self.folder.with_name(self.name)

    # What it was made from.

    @cached_property
    def config(self) -> Config | None:
        """config.yaml as it stands there, unchecked; None when it cannot be read, or its aliases would multiply."""
        return Run.read_config(self.config_file)

    @staticmethod
    def read_config(file: Path) -> Config | None:
        """A config as it stands in a file, unchecked; None when it cannot be read, or its aliases would multiply."""
        try:
            text = file.read_text(encoding="utf-8")
            return None if len(re.findall(r"(^|[\s,:\[{-])\*\w", text)) > MAX_ALIASES else yaml.load(text, Loader)
        except (OSError, yaml.YAMLError, ValueError, RecursionError):
            return None

    def write_config(self, config: Mapping[str, object]) -> None:
        """Write config.yaml; the one that the run began with is kept beside it."""
        if self.config_file.is_file() and not self._first_config.is_file():
            write_text(self._first_config, self.config_file.read_text(encoding="utf-8"))
        write_text(self.config_file, yaml.safe_dump(dict(config), sort_keys=False))
        self.__dict__.pop("config", None)

    @property
    def first_config(self) -> Config | None:
        """The config that the run began with, where it went on with another; else None."""
        return Run.read_config(self._first_config) if self._first_config.is_file() else None

    @property
    def parents(self) -> list["Run"]:
        """The runs that this one was made from, as far as they are still there."""
        config = self.config or cast(Config, {})
        nodes = (config.get("model"), config.get("method"))
        named = [value for node in nodes if isinstance(node, Mapping) for value in node.values()]
        found = {str(run): run for run in map(Run.at, named) if run}
        return list(found.values())

    def keep_weights(self, hashes: Mapping[str, str]) -> None:
        """Keep the SHA-256 of the base weights that the run begins with. Raises `ModelError` when it began with others."""
        if self._weights.is_file():
            self.check_weights(hashes)
        else:
            write_json(self._weights, dict(hashes))

    def check_weights(self, hashes: Mapping[str, str]) -> None:
        """Raise `ModelError` when the base weights are others than the run was made with."""
        try:
            before = json.loads(self._weights.read_text()) if self._weights.is_file() else hashes
        except ValueError:
            raise ModelError(f"{self._weights} cannot be read: the weights the run began with are unknown.") from None
        if changed := sorted(name for name in before.keys() | hashes.keys() if before.get(name) != hashes.get(name)):
            raise ModelError(
                f"{self.folder} was made with other base weights: the SHA-256 of {', '.join(changed[:5])} differs. Put the "
                "weights back that it was trained on, or train again."
            )

    # What it gave.

    @property
    def summary(self) -> Summary | None:
        """summary.json; None when the run is not finished. Raises `ConfigError` when it cannot be read."""
        try:
            return Summary(json.loads(self._summary.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except ValueError:
            raise ConfigError(f"{self._summary} cannot be read.") from None

    def finish(self, summary: Mapping[str, object], samples: Iterable[Mapping[str, object]], by_row: RowScores) -> None:
        """Write samples.jsonl, row_scores.jsonl and, last, summary.json."""
        write_lines(self._samples, samples)
        write_lines(self._row_scores, ({"score": name, **score} for name, score in by_row.items()))
        write_json(self._summary, summary)

    def begin(self, beginning: Mapping[str, object]) -> None:
        """Write beginning.json: how many `steps` there will be, and the `first_batch` as the model reads it."""
        write_json(self._beginning, beginning)

    @property
    def beginning(self) -> dict[str, object]:
        """beginning.json; {} when it is not there or cannot be read."""
        try:
            return dict(json.loads(self._beginning.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def metrics(self) -> Iterator[dict[str, float]]:
        """The whole lines of metrics.jsonl: `step` and what was measured there."""
        with suppress(FileNotFoundError):
            for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):  # half a line, which is still being written
                    yield json.loads(line)

    def samples(self) -> list[Row]:
        """The answers of base and tuned model to the held-out rows; [] when there are none."""
        if not self._samples.is_file():
            return []
        return [json.loads(line) for line in self._samples.read_text(encoding="utf-8").splitlines()]

    def row_scores(self) -> RowScores:
        """The tuned model's scores by held-out row; {} when there are none."""
        if not self._row_scores.is_file():
            return {}
        lines = map(json.loads, self._row_scores.read_text(encoding="utf-8").splitlines())
        return {line.pop("score"): cast(RowScore, line) for line in lines}

    def write_evaluation(self, stem: str, scores: Mapping[str, object], predictions: Iterable[Row]) -> Path:
        """Write the scores and predictions of a later evaluation; returns the file of the predictions."""
        write_json(self.folder / f"{stem}.json", scores)
        file = self.folder / f"{stem}-predictions.jsonl"
        write_lines(file, predictions)
        return file

    def ledger_part(self, rank: int | str) -> Path:
        """What one process has written of the ledger; `*` stands for all."""
        return self.folder / f"ledger-{rank}.jsonl"

    # Who is in it.

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the folder. Raises `StorageError` naming the one that is in it."""
        from filelock import FileLock, Timeout  # not needed to check a config

        owner = self.folder / "owner"
        try:
            with FileLock(self.lock, timeout=0):
                owner.write_text(f"process {os.getpid()} on {socket.gethostname()} since {started(os.getpid())}")
                yield
                owner.unlink(missing_ok=True)
        except Timeout:
            who = owner.read_text().partition(" since ")[0] if owner.is_file() else "another process"
            raise StorageError(f"{self.folder} is in use by {who}. Wait, or begin a new run without resume.") from None

    @property
    def process(self) -> int | None:
        """The process of this machine that is in the folder now; None when there is none, or it is another machine's."""
        try:
            found = OWNER.fullmatch((self.folder / "owner").read_text())
        except OSError:
            return None
        here = found and found[2] == socket.gethostname() and started(int(found[1])) == found[3]
        return int(found[1]) if found and here else None


def started(process: int) -> str:
    """When a process was started: with its number this names it, since numbers are given again. "" when there is none."""
    import psutil

    try:
        return f"{psutil.Process(process).create_time():.2f}"
    except psutil.Error:
        return ""


def keep_lines(file: Path, wanted: Callable[[int], bool]) -> None:
    """Leave only the whole JSON lines of a file whose step, their key `step` or first item, is `wanted`."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, LookupError, TypeError):
            row = json.loads(line)
            kept += [line] if wanted(row["step"] if isinstance(row, dict) else row[0]) else []
    write_text(file, "".join(f"{line}\n" for line in kept))
