"""Start a run: check rows and weights, settle what it is on this machine, choose its folder, launch its processes."""

import os
from collections.abc import Callable

from ftcore.config.build import build, record_type
from ftcore.config.roles import files_of_config
from ftcore.config.tree import put
from ftcore.data.records import Data, Records
from ftcore.files import expanded
from ftcore.machine import torchrun
from ftcore.models.weights import check_weights, weights_hashes
from ftcore.run_folder import Run
from ftcore.runs.folder import run_folder
from ftcore.runs.launch import check_processes, launch, run_rank
from ftcore.runs.planned import with_plan
from ftcore.runs.resolve import resolve, settle_precision
from ftcore.runs.stages import run_stages
from ftcore.settings import Config

Check = Callable[[Config, Records], None]


def train(config: Config, check: Check = lambda *_: None) -> Run | None:
    """Check the machine, then run; of processes that torchrun or SLURM launched, the first decides for all.

    `check` gets the config and the rows before anything trains. Returns the run, None when there is none.
    """
    check_processes(config["hardware"])
    if torchrun.rank():
        if work := torchrun.receive():
            run_rank(*work, ours=False)
        return None
    run = _run(config, check)
    if not run and torchrun.started():
        torchrun.send(None)
    return run


def _run(config: Config, check: Check) -> Run | None:
    """Check rows and weights, choose the run folder, start the processes. Returns None when there is nothing to run."""
    resolve(config, {})  # what this machine lacks is said before any row is read
    records = build(config["data"], Data).load(record_type(config["method"]))
    check_weights(config["model"])
    settle_precision(config)
    check(config, records)
    for key, path in list(files_of_config(config)):  # the run is used from other folders later
        if (local := expanded(path)).exists():
            put(config, key, str(local.resolve()))
    if not run_stages(config):
        return None
    hashes = weights_hashes(config["model"])
    resolved = resolve(config, hashes)
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
            launch(*with_plan(config, resolved, run), run, records)
    return run
