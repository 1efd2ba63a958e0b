"""recipe.lock.json: what the result of a packed run depends on beside its recipe, and the scores it gave.

Versions, machine, weights, tokenizer, chat template and rows are held by name and hash: a lock carries no row, no path and no
weight. It may come from anywhere, so it is read as data of a known shape.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

from ftcore.config.tree import leaves
from ftcore.data.records import Records
from ftcore.data.sources import SPLITS, Row, files_of
from ftcore.errors import ConfigError, ModelError
from ftcore.files import resolve, sha256, write_json
from ftcore.machine.provenance import MachineFacts, MadeWith, made_with
from ftcore.models.weights import weights_folder, weights_hashes
from ftcore.run_folder import Run, Scores, Summary
from ftcore.settings import Config, Model

FORMAT = 1
SIDES = ("base", "tuned")
# What is compared with what is here, in the order of the table.
FACTS = ("versions", "machine", "seed", "model", "rows", "files", "recipe")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
# Scores that are shares, and what they are shares of: they change by whole rows.
SHARES = {"accuracy": "rows_with_checkable_answer", "rewards/accuracies": "rows"}
# Largest relative difference of other scores, and of shares in rows. On a CPU the same versions give the same digits; a GPU
# adds in an order of its own, and what a run makes of it depends on the run: `tolerance=` is for those who know theirs.
CPU = {"relative": 1e-6, "rows": 0}
GPU = {"relative": 1e-2, "rows": 2}
MAX_BYTES, LONGEST = 1_000_000, 200


class ModelFacts(TypedDict):
    """What a model node's weights, tokenizer and chat template are, whatever they are called."""

    revision: str | None
    weights: dict[str, str]
    tokenizer: str | None
    chat_template: str | None


class Facts(MadeWith):
    """What a result depends on beside the recipe."""

    seed: int
    model: ModelFacts
    rows: dict[str, dict[str, object]]
    files: dict[str, dict[str, object]]
    recipe: NotRequired[str]


class Lock(Facts):
    """recipe.lock.json."""

    format: int
    expected: dict[str, Scores]
    tolerance: dict[str, float]


def model_facts(model: Model) -> ModelFacts:
    """Revision and hashes of a model node's weights, tokenizer and effective chat template; fetches nothing that is there."""
    run = Run.at(model["path"])
    folder = run.model if run else weights_folder(model)
    vocabulary = [sha256(folder / name) for name in VOCABULARIES if (folder / name).is_file()]
    return {
        "revision": revision_of(folder),
        "weights": weights_hashes(model),
        "tokenizer": _digest(vocabulary),
        "chat_template": _digest(_template(folder, model["chat_template"])),
    }


def revision_of(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache; None for others."""
    return folder.name if folder.parent.name == "snapshots" else None


def _template(folder: Path, given: str | None) -> object:
    """The text of the template that a run renders with; None when there is none."""
    file = Path(resolve(given)) if given else folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    try:
        return json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
    except (ValueError, AttributeError):
        raise ModelError(f"{settings} cannot be read: copy or download it again.") from None


def _digest(value: object) -> str | None:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() if value else None


def row_facts(records: Records) -> dict[str, dict[str, object]]:
    """Number and hash of each split's rows: the same rows in the same order, whatever their file is called."""
    names = {"train": "train", "validation": "validation", "test": "held_out"}
    return {
        names[part]: {"rows": len(rows), "sha256": _digest([_content(row) for row in rows])}
        for part in SPLITS
        if (rows := getattr(records, part))
    }


def _content(row: Row) -> str:
    """A row without its place; an `id` that is its place goes too."""
    dropped = {"where", *(["id"] if row["where"] in str(row["id"]) else [])}
    return repr(sorted((key, value) for key, value in row.items() if key not in dropped))


def file_facts(path: str) -> dict[str, object]:
    """Name and hash of a file, or of all files that a folder or a pattern means."""
    files = sorted(Path(path).expanduser().glob("*.safetensors")) or files_of(path)[1]
    hashes = [sha256(file) for file in files]
    return {"name": Path(path).name, "sha256": hashes[0] if len(files) == 1 else _digest(hashes)}


def facts(config: Config, records: Records, files: Mapping[str, str]) -> Facts:
    """What a result depends on beside the recipe, as it is here. `files`: dotted key -> path of the user's own ones."""
    return {
        **made_with(config),
        "seed": config["seed"],
        "model": model_facts(config["model"]),
        "rows": row_facts(records),
        "files": {key: file_facts(path) for key, path in files.items()},
    }


def tolerance(machine: MachineFacts) -> dict[str, float]:
    """How far scores may be from the lock's on such a machine."""
    return CPU if machine["device"] == "CPU" else GPU


def write_lock(file: Path, found: Facts, summary: Summary, recipe: Path) -> None:
    """Write the lock beside a recipe. `found` are the run's facts."""
    expected = {side: summary.side(side) for side in SIDES}
    allowed = tolerance(found["machine"]) if found["machine"] else CPU
    lock = {"format": FORMAT, **found, "recipe": sha256(recipe), "expected": expected, "tolerance": allowed}
    write_json(file, lock)


def read_lock(file: Path) -> Lock:
    """A lock from anywhere. Raises `ConfigError` for what is none, or holds text that would do something to a terminal."""
    try:
        content = file.read_bytes()[: MAX_BYTES + 1]
        lock = json.loads(content)
        known = {"format", *FACTS, "expected", "tolerance"}
        right = lock.keys() == known and lock["format"] == FORMAT and _is_plain(lock)
        right = right and all(_are_scores(lock["expected"].get(side)) for side in SIDES)
        right = right and _are_scores(lock["tolerance"]) and lock["tolerance"].keys() == CPU.keys()
    except FileNotFoundError:
        raise ConfigError(f"There is no {file.absolute()}: `pack` writes it beside the recipe; copy both.") from None
    except (ValueError, AttributeError, RecursionError, TypeError):
        right = False
    if not right:
        raise ConfigError(
            f"{file} is not a lock of this version (format {FORMAT}): copy it again, or pack the run again."
        )
    return lock


def _is_plain(node: object) -> bool:
    texts = [text for path, value in leaves(node) for text in (path, value) if isinstance(text, str)]
    return all(text.isprintable() and len(text) <= LONGEST for text in texts)


def _are_scores(node: object) -> bool:
    return isinstance(node, dict) and all(v is None or type(v) in (int, float) for v in node.values())


def differences(lock: Lock, found: Facts) -> list[tuple[str, str, str]]:
    """(what, in the lock, here) for every fact that differs."""
    rows = []
    for part in FACTS:
        then, now = dict(leaves(lock.get(part), part)), dict(leaves(found.get(part), part))
        for path in [*then, *(path for path in now if path not in then)]:
            if then.get(path) != now.get(path):
                rows.append((path, _short(then.get(path)), _short(now.get(path))))
    return rows


def _short(value: object) -> str:
    """Format a value; shorten hashes to 12 characters."""
    text = "none" if value in (None, {}) else str(value)
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text


def disagreements(lock: Lock, summary: Summary, relative: float | None = None) -> list[tuple[str, str, str]]:
    """(score, expected, seen) for scores outside the lock's tolerance, or outside `relative`."""
    allowed = lock["tolerance"] | ({"relative": relative, "share": relative} if relative is not None else {"share": 0})
    found = []
    for side in SIDES:
        expected, seen = lock["expected"][side], summary.side(side)
        for key in expected:
            count = expected.get(SHARES.get(key, ""))
            if not _agree(expected[key], seen.get(key), allowed, count):
                found.append((f"{side}.{key}", str(expected[key]), str(seen.get(key))))
    return found


def _agree(expected: float | None, seen: float | None, allowed: Mapping[str, float], rows: float | None) -> bool:
    if expected is None or seen is None or repr(expected) == repr(seen):
        return repr(expected) == repr(seen)
    if rows:
        return abs(expected - seen) <= max(allowed["rows"] / rows, allowed["share"]) + 1e-9
    return math.isclose(expected, seen, rel_tol=allowed["relative"], abs_tol=allowed["relative"])
