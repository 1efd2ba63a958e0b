"""The folder of a run: a new one, or that of a stopped run to go on with, held by one process at a time."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from ftcore.config.tree import leaves
from ftcore.errors import ConfigError, StorageError
from ftcore.settings import Config

# What may be another when a run goes on: it changes how far, where or how it is watched, not what is computed.
SAFE = {
    "max_steps", "max_epochs", "hardware", "micro_batch_size", "logger", "checkpoints", "resume", "output_dir", "choices",
    "dry_run", "trust", "name", "max_bad_steps", "hang_timeout", "search", "sampler", "sweep",
}  # fmt: skip


def run_folder(config: Config) -> Path | None:
    """The folder to work in, holding config.yaml; None when the run that `resume` names is finished already."""
    if config["resume"] and (folder := _stopped(config)):
        if (folder / "summary.json").is_file():
            print(f"{folder} is finished; there is nothing to go on with. Its scores are in summary.json.")
            return None
        _refuse_changes(folder, config)
        return folder
    return _new(config)


def _parent(config: Config) -> Path:
    return Path(config["output_dir"]).expanduser().resolve() / config["name"]


def _stopped(config: Config) -> Path | None:
    """The run that `resume` means; None when it is `auto` and none of this name was stopped."""
    if config["resume"] != "auto":
        folder = Path(config["resume"]).expanduser().resolve()
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"resume={config['resume']} is not a run folder: {folder / 'config.yaml'} does not exist."
            )
        return folder
    runs = sorted(_parent(config).glob("*/config.yaml"), reverse=True)
    return next((file.parent for file in runs if not (file.parent / "summary.json").is_file()), None)


def _refuse_changes(folder: Path, config: Config) -> None:
    """Raise `ConfigError` with the keys that are not as they were, unless they are all `SAFE`."""
    before = dict(leaves(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))))
    now = dict(leaves(config))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if unsafe := [key for key in changed if key.split(".")[0] not in SAFE]:
        lines = "\n".join(f"  {key}: {before.get(key)} -> {now.get(key)}" for key in unsafe)
        raise ConfigError(
            f"{folder} was begun with other settings:\n{lines}\nGo on with the same ones (resume={folder} alone takes them from "
            "there), or begin a new run without resume."
        )


def _new(config: Config) -> Path:
    """A new folder named by the time."""
    parent, stamp = _parent(config), time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        for name in (stamp, *(f"{stamp}-{k}" for k in range(2, 100))):
            folder = parent / name
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                continue
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"Cannot write the run folder {parent}: {error.strerror}. Set output_dir=<folder>."
        ) from None
    return folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder. Raises `StorageError` naming the one that is in it."""
    owner = folder / "owner"
    try:
        with FileLock(folder / ".lock", timeout=0):
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
            owner.unlink(missing_ok=True)
    except Timeout:
        who = owner.read_text() if owner.is_file() else "another process"
        raise StorageError(f"{folder} is in use by {who}. Wait for it, or begin a new run without resume.") from None
