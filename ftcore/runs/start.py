"""Start a run: check rows and weights, settle what it is on this machine, choose its folder, launch its processes."""

import os
from collections.abc import Callable
from pathlib import Path

from ftcore.config.build import build, record_type
from ftcore.config.roles import files_of_config
from ftcore.config.tree import put
from ftcore.data.records import Data, Records
from ftcore.machine import torchrun
from ftcore.models.weights import check_weights, weights_hashes
from ftcore.run_folder import Run
from ftcore.runs.folder import run_folder
from ftcore.runs.launch import check_processes, follow, launch
from ftcore.runs.resolve import resolve, with_weights
from ftcore.runs.stages import run_stages
from ftcore.settings import Config

First = Callable[[Config, Records], None]


def train(config: Config, first: First = lambda *_: None) -> Run | None:
    """Check the machine, then run; of processes that torchrun or SLURM launched, the first decides for all.

    `first` gets the config and the rows before anything trains. Returns the run, None when there is none.
    """
    check_processes(config["hardware"])
    if torchrun.rank():
        follow()
        return None
    run = _run(config, first)
    if not run and torchrun.started():
        torchrun.tell(None)
    return run


def _run(config: Config, first: First) -> Run | None:
    """Check rows and weights, choose the run folder, start the processes. Returns None when there is nothing to run."""
    resolved = resolve(config)
    records = build(config["data"], Data).load(record_type(config["method"]))
    check_weights(config["model"])
    first(config, records)
    _make_absolute(config)
    if not run_stages(config):
        return None
    hashes = weights_hashes(config["model"])
    resolved = with_weights(resolved, hashes)
    if config["dry_run"]:
        launch(config, resolved, Run(os.devnull), records)
        return None
    if not (run := run_folder(config)):
        return None
    run.keep_weights(hashes)
    if config["hardware"]["slurm"]:
        from ftcore.machine.slurm import submit

        submit(config, run.folder)
    else:
        with run.held():
            launch(config, resolved, run, records)
    return run


def _make_absolute(config: Config) -> None:
    """Local paths as they are from anywhere: the run is used from other folders later."""
    for key, path in list(files_of_config(config)):
        if Path(path).expanduser().exists():
            put(config, key, str(Path(path).expanduser().resolve()))
