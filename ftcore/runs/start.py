"""Start a run: check rows and weights, choose its folder, launch its processes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftcore.machine import torchrun as outside

SPLITS = ("train", "validation", "test")


def train(config: dict[str, Any], first: Callable[[dict[str, Any], Any], None] = lambda *_: None) -> Path | None:
    """Check the machine, then run; of processes that were started from outside the first decides for all.

    `first` gets the config and the rows before anything trains. Returns the run's folder, None when there is none.
    """
    from ftcore.runs.launch import check, follow

    check(config["hardware"])
    if outside.rank():
        follow()
        return None
    if not (folder := _run(config, first)) and outside.started():
        outside.tell(None)
    return folder


def _run(config: dict[str, Any], first: Callable[[dict[str, Any], Any], None]) -> Path | None:
    """Check rows and weights, choose the run folder, start the processes. Returns None when there is nothing to run."""
    from ftcore.config.build import build, record_type
    from ftcore.machine.hardware import micro_batch
    from ftcore.models.weights import check_weights
    from ftcore.runs.folder import held, run_folder
    from ftcore.runs.launch import launch
    from ftcore.runs.stages import run_stages

    options = build(config["hardware"])
    micro_batch(
        global_batch_size=config["global_batch_size"],
        micro_batch_size=config["micro_batch_size"],
        processes=options["devices"] * options["num_nodes"],
    )
    records = build(config["data"]).load(record_type(config["method"]))
    check_weights(config["model"])
    first(config, records)
    _make_absolute(config)
    if not run_stages(config):
        return None
    folder: Path | None = Path(os.devnull)
    if config["dry_run"]:
        launch(config, Path(os.devnull), records)
    elif not (folder := run_folder(config)):
        return None
    elif config["hardware"]["slurm"]:
        from ftcore.machine.slurm import submit

        submit(config, folder)
    else:
        with held(folder):
            launch(config, folder, records)
    return folder


def _make_absolute(config: dict[str, Any]) -> None:
    """Local paths as they are from anywhere: the run is used from other folders later."""
    for node, key in (
        (config["data"], "path"),
        (config["data"], "cloze"),
        (config["model"], "path"),
        (config["model"], "chat_template"),
        (config["evaluate"], "probe"),
        (config["retention"], "text"),
        *((config["method"], key) for key in ("policy", "reward_model")),
        *((source, "path") for source in config["data"].get("sources", {}).values()),
        *((config["data"]["splits"], k) for k in SPLITS),
        *((files, k) for files in config["data"]["records"].values() for k in SPLITS),
    ):
        if node.get(key) and Path(node[key]).expanduser().exists():
            node[key] = str(Path(node[key]).expanduser().resolve())
