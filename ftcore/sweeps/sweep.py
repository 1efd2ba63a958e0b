"""Many runs from one command: `-m method=sft,dpo seed=range(3)`, or a file of sweeps/ with `search` and `sampler`.

All jobs are checked before the first one starts. What a job did is on the disk: the same command again runs only what is not
finished, in the folder that the command's hash names.
"""

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser

from ftcore.config.compose import load_config
from ftcore.config.roles import keys_of
from ftcore.console import plain
from ftcore.errors import ConfigError, FtcoreError, Stopped
from ftcore.machine.isolated import heeded
from ftcore.settings import CHOSEN, Config
from ftcore.sweeps.grid import Grid
from ftcore.sweeps.hydra_launcher import run_with_hydra
from ftcore.sweeps.job import folder_of
from ftcore.sweeps.pool import RunCommand, Source, run_jobs, start_server


class SweepFailed(FtcoreError):  # noqa: N818
    """Some jobs of a sweep failed; the others are done."""


def sweep(
    words: list[str],
    config_dirs: tuple[Path, ...],
    run_command: RunCommand,
    columns: tuple[str, ...],
    page: Callable[[Path], Path],
) -> None:
    """Run every combination, each job by `run_command` in a process of its own, or by a launcher of Hydra that `words` name.

    `columns` are what the table shows of the answers of another verb than train; of runs `page` makes a file to look at. Raises
    `SweepFailed` when some failed, after all others have ended, and `Stopped` on SIGTERM.
    """
    from ftcore.sweeps.report import finish

    launcher = [word for word in words if re.match(r"hydra[/.]launcher\b", word)]
    fixed, searched, config = read_sweep([word for word in words if word not in launcher], config_dirs)
    if launcher and config["sampler"] == "tpe":
        raise ConfigError("sampler=tpe runs its own jobs: leave hydra/launcher out.")
    folder, logger = folder_of(config, searched), config["logger"] or {}
    if "group" in logger and not logger["group"]:  # W&B alone has groups
        kept = [word for word in fixed if not word.startswith("logger.group=")]
        fixed = [*kept, f"logger.group={folder.name}"]  # the jobs are shown together
    shared = [*(f"--config-dir={folder}" for folder in config_dirs), *fixed]
    if not launcher:
        start_server()
    source: Source | None = None
    if config["sampler"] == "grid":
        source = Grid(searched, shared, config_dirs, folder)
    with _held(folder):
        if not source:
            from ftcore.sweeps.tpe import Trials  # needs Optuna

            source = Trials(config, searched, shared, folder)
        if launcher in ([], ["hydra/launcher=ftcore"]):
            run_jobs(source, run_command, config["sweep"])
        else:
            run_with_hydra(launcher, source.jobs, folder)
        finish(config, folder, source.jobs, columns)
        if not columns:
            plain.print(f"The same to look at: {page(folder)}")
    if failed := sum(bool(job.failure) for job in source.jobs):
        raise SweepFailed(f"{failed} of {len(source.jobs)} jobs failed (see the table). The same command runs those.")


def read_sweep(words: list[str], config_dirs: tuple[Path, ...]) -> tuple[list[str], dict[str, object], Config]:
    """The words all jobs share, what is searched (key -> list or range), and the checked config of a first job.

    Raises `ConfigError` for a search that is none.
    """
    fixed, swept = _split(words)
    config = load_config([*fixed, *(f"{key}={values[0]}" for key, values in swept.items())], config_dirs)
    if refused := [key for key in config["search"] if not _may_be_searched(key)]:
        raise ConfigError(f"search.{refused[0]} is not a key that a sweep's file may search.")
    if both := sorted(config["search"].keys() & {word.partition("=")[0].lstrip("+") for word in fixed}):
        raise ConfigError(
            f"{both[0]} has a value here, and the sweep's file searches it: leave it out, or give several values."
        )
    searched = {**swept, **{key: values for key, values in config["search"].items() if key not in swept}}
    if not searched:
        raise ConfigError("Nothing is swept: give several values (-m seed=1,2,3), or sweeps=<file with search:>.")
    return fixed, searched, config


def _may_be_searched(key: str) -> bool:
    """Whether a file may search a key: not where runs are and what they are called, whose code they run, what a sweep is."""
    top = key.split(".")[0]
    known = [*CHOSEN, *keys_of("result", "rows", "scores", "machine", "reporting")]
    return bool(re.fullmatch(r"[\w.]+", key)) and top in known and top != "name" and not re.search(r"(^|\.)_\w+_$", key)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep other commands out of the sweep's folder. A signal ends this one as Ctrl-C does: running jobs save what they have."""

    def stop(number: int, _: object) -> None:
        name = signal.Signals(number).name
        raise Stopped(128 + number, f"{name}: the same command again goes on where the jobs stopped.")

    folder.mkdir(parents=True, exist_ok=True)
    before = {number: signal.signal(number, stop) for number in heeded([signal.SIGTERM, signal.SIGHUP])}
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(f"Another command is running this sweep in {folder}: wait for it, or end it.") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _split(words: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words with one value, and the values of those with several (`a,b`, `range(3)`, `choice(a,b)`)."""
    fixed, swept = [], {}
    for override in OverridesParser.create().parse_overrides(words):
        if not override.is_sweep_override():
            fixed.append(override.input_line or "")
        elif override.is_discrete_sweep():
            swept[override.get_key_element()] = list(override.sweep_string_iterator())
        else:
            raise ConfigError(f"{override.input_line!r}: a range without steps needs sampler=tpe and a sweep's file.")
    return fixed, swept
