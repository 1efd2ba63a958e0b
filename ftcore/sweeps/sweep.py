"""Many runs from one command: `-m method=sft,dpo seed=range(3)`, or a file of sweeps/ with `search` and `sampler`.

All jobs are checked before the first one starts. What a job did is on the disk: the same command again runs only what is not
finished, in the folder that the command's hash names.
"""

import itertools
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser

from ftcore.config.compose import load_config
from ftcore.errors import ConfigError, FtcoreError
from ftcore.models.weights import check_weights
from ftcore.settings import Config
from ftcore.sweeps.job import Job, folder_of, job_of, told
from ftcore.sweeps.pool import Pool, progress, start_server

# What a file may not search: where runs are, whose code they run, what a sweep is.
NOT_SEARCHED = {"output_dir", "name", "resume", "run", "other", "verb", "trust", "choices", "sweeps", "search", "sampler",
                "sweep", "hydra"}  # fmt: skip


class SweepFailed(FtcoreError):  # noqa: N818
    """Some jobs of a sweep failed; the others are done."""

    exit_code = 1


def sweep(words: list[str], config_dirs: tuple[Path, ...]) -> None:
    """Run every combination. Raises `SweepFailed` when some failed, after all others have ended."""
    from ftcore.sweeps.report import finish

    launcher = [word for word in words if re.match(r"hydra[/.]launcher\b", word)]
    fixed, searched, config = read_sweep([word for word in words if word not in launcher], config_dirs)
    folder = folder_of(config, searched)
    if config["logger"] and not config["logger"]["group"]:
        fixed = [*fixed, f"logger.group={folder.name}"]  # the jobs are shown together
    flags = [f"--config-dir={folder}" for folder in config_dirs]
    if not launcher:
        start_server()
    jobs = [] if config["sampler"] == "tpe" else _checked_jobs(fixed, flags, searched, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if config["sampler"] == "tpe":
            failed, jobs = _optimised(config, fixed, flags, searched, launcher, folder)
        else:
            failed = _run(config, jobs, launcher, folder)
        finish(config, folder, jobs, failed)
    if failed:
        raise SweepFailed(
            f"{len(failed)} of {len(jobs)} jobs failed; the table says why. The same command again runs only those."
        )


def read_sweep(words: list[str], config_dirs: tuple[Path, ...]) -> tuple[list[str], Config, Config]:
    """The words all jobs share, what is searched (key -> list or range), and the checked config of a first job.

    Raises `ConfigError` for a search that is none.
    """
    fixed, swept = _split(words)
    config = load_config([*fixed, *(f"{key}={values[0]}" for key, values in swept.items())], config_dirs)
    for key in config["search"]:
        if not re.fullmatch(r"[\w.]+", key) or key.split(".")[0] in NOT_SEARCHED or re.search(r"(^|\.)_\w+_$", key):
            raise ConfigError(f"search.{key} is not a key that a sweep's file may search.")
    searched = swept | {key: values for key, values in config["search"].items() if key not in swept}
    if not searched:
        raise ConfigError(
            "Nothing is swept: give several values (-m seed=1,2,3), or a file with search: (sweeps=<name>)."
        )
    return fixed, searched, config


def _optimised(
    config: Config, fixed: list[str], flags: list[str], searched: Config, launcher: list[str], folder: Path
) -> tuple[dict[int, str], list[Job]]:
    from ftcore.sweeps.tpe import optimise

    if launcher:
        raise ConfigError("sampler=tpe runs its own jobs: leave hydra/launcher out.")
    return optimise(config, fixed, flags, searched, folder)


def _checked_jobs(fixed: list[str], flags: list[str], searched: Config, folder: Path) -> list[Job]:
    """All jobs of a grid. Raises `FtcoreError` for the first whose config is wrong or whose weights are damaged."""
    jobs = _jobs(fixed, flags, {key: _listed(key, values) for key, values in searched.items()}, folder)
    models: list[Config] = []
    for job in jobs:
        model = load_config([word for word in job.words if not word.startswith("--")], _folders(flags))["model"]
        if model not in models:
            check_weights(model)
            models.append(model)
    return jobs


def _run(config: Config, jobs: list[Job], launcher: list[str], folder: Path) -> dict[int, str]:
    """Run what is not finished: job number -> why it failed."""
    if launcher and launcher != ["hydra/launcher=ftcore"]:
        from ftcore.sweeps.hydra_launcher import run_with_hydra

        return run_with_hydra(launcher, jobs, folder)
    return run_grid(config, jobs)


def _folders(flags: list[str]) -> tuple[Path, ...]:
    return tuple(Path(flag.split("=", 1)[1]) for flag in flags)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two commands do not run the jobs of one folder at the same time."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(f"Another command is running this sweep in {folder}: wait for it, or end it.") from None


def _split(words: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words with one value, and the values of those with several (`a,b`, `range(3)`, `choice(a,b)`)."""
    fixed, swept = [], {}
    for override in OverridesParser.create().parse_overrides(words):
        if not override.is_sweep_override():
            fixed.append(override.input_line or "")
        elif override.is_discrete_sweep():
            swept[override.get_key_element()] = list(override.sweep_string_iterator())
        else:
            raise ConfigError(
                f"{override.input_line!r}: a range without steps needs a file with sampler: tpe (sweeps/)."
            )
    return fixed, swept


def _listed(key: str, values: Any) -> list[str]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"search.{key}: sampler=grid needs a list of values; ranges are for sampler=tpe.")
    return [told(value) for value in values]


def _jobs(fixed: list[str], flags: list[str], lists: dict[str, list[str]], folder: Path) -> list[Job]:
    """Every combination of the lists, the last key changing fastest."""
    combinations = itertools.product(*lists.values())
    return [
        job_of(k, dict(zip(lists, values, strict=True)), fixed, flags, folder) for k, values in enumerate(combinations)
    ]


def run_grid(config: Config, jobs: list[Job]) -> dict[int, str]:
    """Run the jobs that are not finished; number -> reason of those that failed."""
    pending = [job for job in jobs if not job.summary and not job.submitted]
    pool = Pool(min(config["sweep"]["n_jobs"], max(len(pending), 1)), config["sweep"]["time_limit"])
    failed: dict[int, str] = {}
    with progress() as bar, closing(pool):
        task = bar.add_task("jobs", total=len(jobs), completed=len(jobs) - len(pending), failed=0)
        while pending or pool.running:
            while pending and not pool.full:
                pool.start(pending.pop(0))
            ended = pool.wait()
            assert ended
            job, reason = ended
            if reason:
                failed[job.number] = reason
            bar.update(task, advance=1, failed=len(failed))
    return failed
