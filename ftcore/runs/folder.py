"""The folder that a run works in: a new one, or that of a stopped run to go on with."""

import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from ftcore.config.compose import of_run
from ftcore.config.roles import role_of
from ftcore.config.tree import flatten
from ftcore.console import plain, typed
from ftcore.errors import ConfigError, StorageError
from ftcore.run_folder import Run
from ftcore.settings import Config


def run_folder(config: Config) -> Run | None:
    """The run to work on, holding config.yaml; None when the one that `resume` names is finished already."""
    parent = Path(config["output_dir"]).expanduser().resolve() / config["name"]
    if not config["resume"] or not (run := _stopped(config["resume"], parent)):
        return _new(config, parent)
    if run.finished:
        plain.print(f"{run} is finished; there is nothing to go on with. Its scores are in summary.json.")
        return None
    _refuse_changes(run, config)
    return run


def _stopped(resume: str, parent: Path) -> Run | None:
    """The run that `resume` means; None when it is `auto` and none of this name was stopped."""
    if resume == "auto":
        return next((run for run in Run.named(parent) if not run.finished), None)
    run = Run(Path(resume).expanduser().resolve())
    if not run.begun:
        raise ConfigError(f"resume={resume} is not a run folder: {run.config_file} does not exist.")
    return run


def _refuse_changes(run: Run, config: Config) -> None:
    """Raise `ConfigError` with the keys that are not as they were, unless they may change when a run goes on."""
    before, now = dict(flatten(run.config)), dict(flatten(of_run(config)))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if refused := [key for key in changed if not role_of(key, config).resume]:
        lines = "\n".join(f"  {key}: {before.get(key)} -> {now.get(key)}" for key in refused)
        raise ConfigError(
            f"{run} was begun with other settings:\n{lines}\nGo on with the same ones ({typed(f'resume={run}')} alone takes "
            "them from there), or begin a new run without resume."
        )


def _new(config: Config, parent: Path) -> Run:
    """A new folder named by the time."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        for k in count(1):
            run = Run(parent / (f"{stamp}-{k}" if k > 1 else stamp))
            with suppress(FileExistsError):  # of a run that began in the same second
                run.folder.mkdir(parents=True)
                break
        run.write_config(of_run(config))
    except OSError as error:
        raise StorageError(f"Cannot write runs to {parent}: {error.strerror}. Set output_dir=<folder>.") from None
    return run
