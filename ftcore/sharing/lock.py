"""recipe.lock.json: what the result of a packed run depends on beside its recipe, and the scores it gave.

Versions, machine, weights, tokenizer, chat template and rows are held by name and hash: a lock carries no row, no path and no
weight. What a run was made from, earlier runs and votes, it names by hash too. It may come from anywhere, so it is read as data
of a known shape.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from ftcore.config.tree import flatten
from ftcore.data.records import Records
from ftcore.data.sources import Row, files_of
from ftcore.errors import ConfigError, ModelError
from ftcore.files import expanded, json_hash, resolve, sha256, write_json
from ftcore.machine.provenance import MadeWith, made_with
from ftcore.models.weights import CONFIG, weights_folder, weights_hashes
from ftcore.run_folder import Run, Scores, Summary
from ftcore.settings import Config, Model
from ftcore.sharing.places import own_places

LOCK = "recipe.lock.json"
FORMAT = 1
SIDES = ("base", "tuned")
# What is compared with what is here.
FACTS = ("versions", "machine", "seed", "model", "rows", "files", "recipe")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
# Scores that are shares, and what they are shares of: they change by whole rows.
SHARES = {"accuracy": "rows_with_checkable_answer", "rewards/accuracies": "rows"}
# Largest relative difference of other scores, and of shares in rows. On a CPU the same versions give the same digits; a GPU
# adds in an order of its own, and what a run makes of it depends on the run: `tolerance=` is for those who know theirs.
CPU = {"relative": 1e-6, "rows": 0}
GPU = {"relative": 1e-2, "rows": 2}
MAX_BYTES, LONGEST = 1_000_000, 200
# What older locks lack.
LATER = {"parents", "votes"}
HASH = re.compile(r"[0-9a-f]{64}")


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
    parents: NotRequired[list[str]]
    votes: NotRequired[str | None]


def facts(config: Config, records: Records) -> Facts:
    """What a result depends on beside the recipe, as it is here."""
    parts = {"train": records.train, "validation": records.validation, "held_out": records.test}
    return {
        **made_with(config),
        "seed": config["seed"],
        "model": _model_facts(config["model"]),
        "rows": {
            name: {"rows": len(part), "sha256": _digest([*map(_content, part)])} for name, part in parts.items() if part
        },
        "files": {key: _file_facts(path) for key, path in own_places(config) if key != "model.path"},
    }


def _model_facts(model: Model) -> ModelFacts:
    """Revision and hashes of a model node's weights, tokenizer and effective chat template; fetches nothing that is there."""
    run = Run.at(model["path"])
    folder = run.model if run else weights_folder(model)
    return {
        "revision": folder.name if folder.parent.name == "snapshots" else None,  # in the hub's cache
        "weights": {
            name: found for name, found in weights_hashes(model).items() if name != CONFIG or model["random_weights"]
        },
        "tokenizer": _digest([sha256(folder / name) for name in VOCABULARIES if (folder / name).is_file()]),
        "chat_template": _digest(_template(folder, model["chat_template"])),
    }


def _template(folder: Path, own: str | None) -> object:
    """The text of the template that a run renders with; None when there is none."""
    file, settings = Path(resolve(own)) if own else folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    try:
        return json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
    except (ValueError, AttributeError):
        raise ModelError(f"{settings} cannot be read: copy or download it again.") from None


def _content(row: Row) -> str:
    """A row without its place; an `id` that is its place goes too."""
    place = {"where", *(["id"] if row["where"] in str(row["id"]) else [])}
    return repr(sorted((key, value) for key, value in row.items() if key not in place))


def _file_facts(path: str) -> dict[str, object]:
    """Name and hash of a file, or of all files that a folder or a pattern means."""
    files = sorted(expanded(path).glob("*.safetensors")) or files_of(path)[1]
    hashes = [sha256(file) for file in files]
    return {"name": Path(path).name, "sha256": hashes[0] if len(files) == 1 else _digest(hashes)}


def _digest(value: object) -> str | None:
    return json_hash(value) if value else None


def write_lock(file: Path, found: Facts, summary: Summary, recipe: Path) -> None:
    """Write the lock of a recipe. `found` are the run's facts."""
    on_gpu = found["machine"] and found["machine"]["device"] != "CPU"
    scores = {"expected": {side: summary.side(side) for side in SIDES}, "tolerance": GPU if on_gpu else CPU}
    write_json(file, {"format": FORMAT, **found, "recipe": sha256(recipe), **scores, **_made_from(summary)})


def _made_from(summary: Summary) -> dict[str, object]:
    """The hashes of the weights of a run's parents, and of its votes; runs of before did not note them."""
    parents = cast(list[dict[str, str]], summary.get("parents", []))
    votes = cast(dict[str, str], summary.get("votes", {}))
    return {"parents": [parent["weights"] for parent in parents], "votes": votes.get("sha256")}


def read_lock(file: Path) -> Lock:
    """A lock from anywhere. Raises `ConfigError` for what is none, or holds text that would do something to a terminal."""
    try:
        content = file.read_bytes()[: MAX_BYTES + 1]
        lock = json.loads(content)
        known = {"format", *FACTS, "expected", "tolerance"}
        right = lock.keys() - LATER == known and lock["format"] == FORMAT and _is_plain(lock)
        right = right and all(_are_scores(lock["expected"].get(side)) for side in SIDES)
        right = right and _are_hashes([*lock.get("parents", []), *filter(None, [lock.get("votes")])])
        right = right and _are_scores(lock["tolerance"]) and lock["tolerance"].keys() == CPU.keys()
    except FileNotFoundError:
        raise ConfigError(f"There is no {file.absolute()}: `pack` writes it beside the recipe; copy both.") from None
    except (ValueError, AttributeError, RecursionError, TypeError):
        right = False
    if not right:
        raise ConfigError(f"{file} is not a lock of this version (format {FORMAT}): copy it or pack the run again.")
    return lock


def _is_plain(node: object) -> bool:
    texts = [text for pair in flatten(node) for text in pair if isinstance(text, str)]
    return all(text.isprintable() and len(text) <= LONGEST for text in texts)


def _are_hashes(values: list[object]) -> bool:
    return all(isinstance(value, str) and HASH.fullmatch(value) for value in values)


def _are_scores(node: object) -> bool:
    return isinstance(node, dict) and all(v is None or type(v) in (int, float) for v in node.values())


def differences(lock: Lock, found: Facts) -> list[tuple[str, str, str]]:
    """(fact, in the lock, here) for every fact that differs."""
    then, now = (dict(flatten({part: facts.get(part) for part in FACTS})) for facts in (lock, found))
    differing = [path for path in then | now if then.get(path) != now.get(path)]
    return [(path, _short(then.get(path)), _short(now.get(path))) for path in differing]


def rounds_otherwise(lock: Lock, differing: list[str]) -> bool:
    """Whether a run with these differing facts may come to other weights than the lock's although nothing is wrong."""
    return lock["tolerance"] != CPU or any(path.startswith(("versions.", "machine.")) for path in differing)


def _short(value: object) -> str:
    """Format a value; shorten hashes to 12 characters."""
    text = "none" if value in (None, {}) else str(value)
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text


def disagreements(lock: Lock, summary: Summary, relative: float | None = None) -> list[tuple[str, str, str]]:
    """(score, expected, seen) for scores outside the lock's tolerance, or outside `relative`."""
    allowed = lock["tolerance"] | ({"share": 0} if relative is None else {"relative": relative, "share": relative})
    found = []
    for side in SIDES:
        expected, seen = lock["expected"][side], summary.side(side)
        for key, score in expected.items():
            if not _agree(score, seen.get(key), allowed, expected.get(SHARES.get(key, ""))):
                found.append((f"{side}.{key}", str(score), str(seen.get(key))))
    return found


def _agree(expected: float | None, seen: float | None, allowed: Mapping[str, float], rows: float | None) -> bool:
    if expected is None or seen is None or repr(expected) == repr(seen):
        return repr(expected) == repr(seen)
    if rows:
        return abs(expected - seen) <= max(allowed["rows"] / rows, allowed["share"]) + 1e-9
    return math.isclose(expected, seen, rel_tol=allowed["relative"], abs_tol=allowed["relative"])
