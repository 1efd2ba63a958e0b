"""Runs that a method needs before its own, each made once, as an ordinary run, cached under a hash of everything it depends on.

A method's YAML lists them under `stages`, name -> overrides, composed on the same model, adapter and data;
`method.<name>=<run>` uses an existing run instead. A sweep over other keys of the method finds them finished.
"""

import os
import re
from pathlib import Path
from typing import cast

from filelock import FileLock

from ftcore import __version__
from ftcore.config.build import build, record_type
from ftcore.config.compose import load_config, of_run
from ftcore.config.roles import files_of_config, role_of, top_roles, values_of
from ftcore.console import plain, typed
from ftcore.data.records import Data
from ftcore.errors import ConfigError
from ftcore.files import home, resolve, sha256, short_hash
from ftcore.machine import torchrun
from ftcore.models.weights import check_path, weights_hashes
from ftcore.run_folder import PARTIAL, Run
from ftcore.runs.launch import launch
from ftcore.runs.resolve import resolve as settle
from ftcore.runs.resolve import settle_precision
from ftcore.settings import CHOSEN, FILES, NAMED_AFTER, Config


def stages_of(method: dict[str, object]) -> dict[str, list[str]]:
    """The stages that a method's node lists, with their overrides."""
    return cast(dict[str, list[str]], method.get("stages", {}))


def run_stages(config: Config) -> bool:
    """Make the stages that are missing and enter their folders into the config; False when `dry_run` left one unmade.

    The stage `policy` is what the run starts from. A `model.path` that is a run already is one.
    """
    method = config["method"]
    listed = stages_of(method)
    if Run.at(config["model"].get("path")) and "policy" in listed:
        method["policy"] = method["policy"] or config["model"]["path"]
    if unknown := sorted(set(listed) - set(method)):
        raise ConfigError(f"method.stages.{unknown[0]} is no stage: this method has no key method.{unknown[0]} for it.")
    for name in listed:
        if method[name]:  # what is given must be there before the first stage trains
            check_path(str(method[name]))
    stages = {name: stage_config(config, name, words) for name, words in listed.items() if method[name] is None}
    folders = {name: folder_of(stage) for name, stage in stages.items()}  # checks all rows before the first one trains
    for name, stage in stages.items():
        if not _make(name, stage, listed[name], folders[name], config["dry_run"]):
            return False
        method[name] = str(folders[name])
    if policy := method.get("policy"):
        config["model"] = {**config["model"], "path": str(policy)}
    return True


def stage_config(config: Config, name: str, words: list[str]) -> Config:
    """The checked config of a stage: its overrides on the model, adapter, data and machine of the run it is for."""
    keys = {re.split(r"[=.@/:]", word.lstrip("+~"))[0].strip() for word in words}
    # Whose code runs and what is private stays as it is for this process.
    fixed = {"trust": f"[{','.join(config['trust'])}]", "private": str(config["private"])}
    roles = top_roles()
    theirs = {key for key, role in roles.items() if role.kind in ("command", "place")}
    if refused := keys & {*theirs, *FILES, *fixed}:
        raise ConfigError(f"method.stages.{name} may set a method and its keys, not {', '.join(sorted(refused))}.")
    stage = load_config([*words, *(f"{key}={value}" for key, value in fixed.items())])
    kept = {key: value for key, value in config.items() if key in roles and roles[key].stage and key not in keys}
    choices = stage["choices"] | {key: option for key, option in config["choices"].items() if key in kept}
    stage = cast(Config, {**stage, **kept, "choices": choices, "name": f"{config['name']}-{name}"})
    size, processes = config["micro_batch_size"], stage["hardware"]["devices"] * stage["hardware"]["num_nodes"]
    # Where its steps cannot be cut into micro-batches of this size, a stage keeps its own.
    if "micro_batch_size" not in keys and size != "auto" and stage["global_batch_size"] % (size * processes) == 0:
        stage["micro_batch_size"] = size
    settle_precision(stage)
    return stage


def folder_of(stage: Config) -> Path:
    """Where a stage's run is kept: named by a hash of what its result depends on, its rows, texts and local weights included."""
    rows = build(stage["data"], Data).load(record_type(stage["method"])).content_hash
    named = [path for key, path in files_of_config(stage, "text") if role_of(key, stage).kind != "rows"]
    texts = [sha256(Path(resolve(path))) for path in named]
    path = stage["model"].get("path")
    local = weights_hashes(stage["model"]) if path and Path(resolve(path)).is_dir() else {}
    decides = [__version__, sorted(values_of(stage, "result").items()), rows, texts, sorted(local.items())]
    return home() / "stages" / f"{stage['choices']['method']}-{short_hash(decides)}"


def _make(name: str, stage: Config, words: list[str], folder: Path, dry_run: bool) -> bool:
    """Run a stage unless it is there; whoever comes second waits. Returns whether it is there."""
    settle(stage, {})  # its words may ask for another machine
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if Run(folder).finished:
            plain.print(f"Stage {name}: {folder} (made before)")
            return True
        _refuse_to_start(name, stage, words)
        plain.print(f"Stage {name}: {' '.join(str(stage['choices'][key]) for key in NAMED_AFTER)}")
        hashes = weights_hashes(stage["model"])
        resolved = settle(stage, hashes)
        if dry_run:
            launch({**stage, "dry_run": True}, resolved, Run(os.devnull))
            return False
        partial = Run(folder.with_name(folder.name + PARTIAL))
        partial.folder.mkdir(exist_ok=True)  # one that was stopped goes on
        partial.write_config(of_run(stage))
        partial.keep_weights(hashes)
        launch(stage, resolved, partial)
        if not partial.finished:
            raise ConfigError(f"Stage {name} did not finish its run in {partial}: see method.stages.{name}.")
        partial.folder.rename(folder)
    return True


def _refuse_to_start(name: str, stage: Config, words: list[str]) -> None:
    """Raise `ConfigError` with the command to run first where this process cannot start others."""
    if torchrun.started() or stage["hardware"]["slurm"]:
        choices = [f"{group}={stage['choices'][group]}" for group in CHOSEN if group != "method"]
        raise ConfigError(
            f"Stage {name} is not made yet, and processes that something else starts cannot start others. Run it first:\n"
            f"  {typed('python', '-m', 'ftcore', *choices, *words)}\nand give its folder as method.{name}=<run>."
        )
