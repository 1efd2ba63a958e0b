"""The folder that a run works in: a new one, or that of a stopped run to go on with."""

import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path

from ftcore.config.compose import of_run
from ftcore.config.roles import role_of
from ftcore.config.tree import differing
from ftcore.console import plain, typed
from ftcore.errors import ConfigError, StorageError
from ftcore.files import expanded
from ftcore.run_folder import TIME, Run
from ftcore.settings import Config


def run_folder(config: Config) -> Run | None:
    """The run to work on, holding config.yaml; None when the one that `resume` names is finished already."""
    parent = expanded(config["output_dir"]).resolve() / config["name"]
    if not config["resume"] or not (run := _stopped(config["resume"], parent)):
        return _new(config, parent)
    if run.finished:
        plain.print(f"{run} is finished; there is nothing to go on with. Its scores are in summary.json.")
        return None
    _note_changes(run, config)
    return run


def _stopped(resume: str, parent: Path) -> Run | None:
    """The run that `resume` means; None when it is `auto` and none of this name was stopped."""
    if resume == "auto":
        return next((run for run in Run.named(parent) if not run.finished), None)
    run = Run(expanded(resume).resolve())
    if not run.begun:
        raise ConfigError(f"resume={resume} is not a run folder: {run.config_file} does not exist.")
    return run


def changed_keys(before: Mapping[str, object] | None, after: Mapping[str, object]) -> dict[str, str]:
    """Key -> "before -> after" of what two configs differ in."""
    return {key: f"{old} -> {new}" for key, (old, new) in differing(before, after).items()}


def changes_of_result(run: Run) -> dict[str, str]:
    """Keys of the result that a run went on with otherwise than it began: from its start it would be another run."""
    first, last = run.first_config, run.config
    changed = changed_keys(first, last) if first and last else {}
    return {key: change for key, change in changed.items() if last and role_of(key, last).kind == "result"}


def _note_changes(run: Run, config: Config) -> None:
    """Write down what the run goes on with. Raises `ConfigError` for keys that may not change when a run goes on."""
    changed = changed_keys(run.config, of_run(config))
    if refused := [key for key in changed if not role_of(key, config).resume]:
        lines = "\n".join(f"  {key}: {changed[key]}" for key in refused)
        raise ConfigError(
            f"{run} was begun with other settings:\n{lines}\nGo on with the same ones ({typed(f'resume={run}')} alone takes "
            "them from there), or begin a new run without resume."
        )
    if changed:
        run.write_config(of_run(config))
    if of_result := changes_of_result(run):
        shown = ", ".join(f"{key}: {change}" for key, change in of_result.items())
        plain.print(f"Going on otherwise than the run began ({shown}): its schedule is another from here on.")


def _new(config: Config, parent: Path) -> Run:
    """A new folder, named by the time or, where the clock was set back, by that of the newest run: it sorts last."""
    stamp = max([time.strftime(TIME), *(run.started[0] for run in Run.named(parent)[:1])])
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
