"""Runs that a method needs before its own: each is made once, as an ordinary run, and kept by what it depends on.

A method's YAML lists them under `stages`, name -> overrides, composed on the same model, adapter and data;
`method.<name>=<run>` uses an existing run instead. A sweep over other keys of the method finds them finished.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from ftcore import __version__
from ftcore.config.build import build, record_type
from ftcore.config.compose import load_config
from ftcore.errors import ConfigError
from ftcore.files import home, resolve
from ftcore.machine import torchrun as outside
from ftcore.models.weights import check_weights, file_marks, is_run, sha256
from ftcore.settings import OF_THE_COMMAND, Config

# What a stage takes over from the run it is for, unless its overrides choose otherwise.
INHERITED = (
    "model",
    "adapter",
    "data",
    "hardware",
    "logger",
    "seed",
    "evaluate",
    "trainer",
    "trust",
    "private",
)


# What its result depends on.
DECISIVE = (
    "model", "adapter", "method", "seed", "global_batch_size", "max_steps", "max_epochs", "retention", "trainer",
    "keep_best", "patience", "validate_every",
)  # fmt: skip


# How a data option turns rows into tokens; the rows themselves count by their content.
ENCODING = ("max_length", "too_long", "chat")


def run_stages(config: Config) -> bool:
    """Make the stages that are missing and enter their folders into the config; False when `dry_run` left one unmade.

    The stage `policy` is what the run starts from. A `model.path` that is a run already is one.
    """
    method = config["method"]
    if is_run(config["model"].get("path")) and "policy" in method.get("stages", {}):
        method["policy"] = method["policy"] or config["model"]["path"]
    if unknown := sorted(set(method.get("stages", {})) - set(method)):
        raise ConfigError(
            f"method.stages.{unknown[0]} is no stage: this method has no key method.{unknown[0]} for its run."
        )
    for name in method.get("stages", {}):
        if method[name]:  # what is given must be there before the first stage trains
            check_weights({"path": method[name], "package": None, "revision": None, "random_weights": False})
    missing = {name: words for name, words in method.get("stages", {}).items() if method[name] is None}
    stages = {name: stage_config(config, name, words) for name, words in missing.items()}
    folders = {
        name: folder_of(stage) for name, stage in stages.items()
    }  # all rows are checked before the first stage trains
    for name, stage in stages.items():
        if not _make(name, stage, missing[name], folders[name], config["dry_run"]):
            return False
        method[name] = str(folders[name])
    if method.get("policy"):
        config["model"] = {**config["model"], "path": method["policy"]}
    return True


def stage_config(config: Config, name: str, words: list[str]) -> Config:
    """The checked config of a stage: its overrides on the model, adapter, data and machine of the run it is for."""
    keys = {re.split(r"[=.@/:]", word.lstrip("+~"))[0].strip() for word in words}
    if refused := keys & {*OF_THE_COMMAND, "recipes", "sweeps", "output_dir", "private"}:
        raise ConfigError(
            f"method.stages.{name} may not set {', '.join(sorted(refused))}; it names a method and its keys."
        )
    # Whose code runs and what is private stays as it is for this process.
    stage = load_config([*words, f"trust=[{','.join(config['trust'])}]", f"private={config['private']}"])
    kept = [key for key in INHERITED if key not in keys]
    stage |= {key: config[key] for key in kept}
    stage["choices"] |= {key: config["choices"][key] for key in kept if key in stage["choices"]}
    stage["name"] = f"{config['name']}-{name}"
    if "micro_batch_size" not in keys and _fits(config["micro_batch_size"], stage):
        stage["micro_batch_size"] = config["micro_batch_size"]
    return stage


def _fits(micro_batch_size: Any, stage: Config) -> bool:
    """Whether a stage's steps can be cut into micro-batches of this size; where not it chooses its own."""
    processes = stage["hardware"]["devices"] * stage["hardware"]["num_nodes"]
    return isinstance(micro_batch_size, int) and stage["global_batch_size"] % (micro_batch_size * processes) == 0


def folder_of(stage: Config) -> Path:
    """Where a stage's run is kept: named by a hash of what its result depends on, its rows included."""
    rows = build(stage["data"]).load(record_type(stage["method"])).content_hash
    decisive = {key: stage[key] for key in DECISIVE} | {key: stage["data"][key] for key in ENCODING}
    named = (stage["model"].get("chat_template"), stage["retention"]["text"], stage["evaluate"]["probe"])
    texts = [sha256(Path(resolve(path))) for path in named if path]
    path = stage["model"].get("path")
    marks = file_marks(Path(resolve(path))) if path and Path(resolve(path)).is_dir() else []
    content = json.dumps([__version__, decisive, rows, texts, marks], sort_keys=True)
    return home() / "stages" / f"{stage['choices']['method']}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _make(name: str, stage: Config, words: list[str], folder: Path, dry_run: bool) -> bool:
    """Run a stage unless it is there; whoever comes second waits. Returns whether it is there."""
    from ftcore.runs.launch import launch

    build(stage["hardware"])  # its words may ask for another machine
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / "summary.json").is_file():
            print(f"Stage {name}: {folder} (made before)")
            return True
        if outside.started() or stage["hardware"]["slurm"]:
            choices = [f"{group}={stage['choices'][group]}" for group in ("model", "adapter", "data", "hardware")]
            command = " ".join([*choices, *words])
            raise ConfigError(
                f"Stage {name} is not made yet, and processes that something else starts cannot start others. Run it first:\n"
                f"  python -m ftcore {command}\nand give its folder as method.{name}=<run>."
            )
        print(f"Stage {name}: {' '.join(str(stage['choices'][key]) for key in ('method', 'data', 'model'))}")
        if dry_run:
            launch({**stage, "dry_run": True}, Path(os.devnull))
            return False
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(exist_ok=True)  # one that was stopped goes on
        (partial / "config.yaml").write_text(yaml.safe_dump(stage, sort_keys=False), encoding="utf-8")
        launch(stage, partial)
        if not (partial / "summary.json").is_file():
            raise ConfigError(
                f"Stage {name} left no finished run in {partial}; look at its overrides, method.stages.{name}."
            )
        partial.rename(folder)
    return True
