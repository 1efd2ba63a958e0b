"""Sweeps that look where it was good so far: Optuna's ask-and-tell over jobs, its study in a file of the sweep's folder.

Sampler: tree-structured Parzen estimator (Bergstra et al. 2011). With `sweep.prune`, a job whose metric is worse than the
median of the others at the same step is ended (Optuna's MedianPruner). The same command again goes on with the study: jobs that
failed or were cut off first, then new ones until `sweep.trials` have ended.
"""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from ftcore.errors import ConfigError
from ftcore.settings import Config
from ftcore.sweeps.job import Job, job_of, told, value
from ftcore.sweeps.pool import Pool, progress

RANGE = {"low", "high", "log", "step"}


LOOK_EVERY = 1.0  # seconds between looks at the metrics of running jobs


KEPT_AS = "job"  # attribute of a trial that repeats an earlier one: the number of that one's job


def optimise(
    config: Config, fixed: list[str], flags: list[str], search: Config, folder: Path
) -> tuple[dict[int, str], list[Job]]:
    """Run jobs until `sweep.trials` have ended; (number -> reason of those that failed, all jobs in order).

    Raises `ConfigError` when Optuna is missing or a range cannot be.
    """
    optuna = _optuna()
    spaces = {key: _distribution(optuna, key, values) for key, values in search.items()}
    study = _study(optuna, config, folder)
    _again(optuna, study)

    def job_for(trial: Any) -> Job:
        changes = {key: told(word) for key, word in trial.params.items()}
        return job_of(trial.user_attrs.get(KEPT_AS, trial.number), changes, fixed, flags, folder)

    failed = _Search(optuna, study, config["sweep"], spaces, job_for).run()
    jobs = {(job := job_for(trial)).number: job for trial in study.trials}
    return failed, [jobs[number] for number in sorted(jobs)]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError("sampler=tpe needs Optuna: pip install 'ftcore[sweeps]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distribution(optuna: Any, key: str, values: Any) -> Any:
    """A list is a choice; `{low, high}` a range of whole numbers or of any, on a log scale or in steps if it says so."""
    if isinstance(values, list) and values:
        return optuna.distributions.CategoricalDistribution([told(word) for word in values])
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= RANGE:
        raise ConfigError(
            f"search.{key} must be a list of values, or low and high (and log: true, or step) of a range."
        )
    whole = all(isinstance(values[word], int) for word in {"low", "high", "step"} & values.keys())
    kind = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"search.{key}: {error}") from None


def _study(optuna: Any, config: Config, folder: Path) -> Any:
    """The study of this folder, begun or gone on with."""
    folder.mkdir(parents=True, exist_ok=True)
    file = optuna.storages.journal.JournalFileBackend(str(folder / "study.log"))
    study = optuna.create_study(
        study_name=folder.name,
        storage=optuna.storages.JournalStorage(file),
        direction=config["sweep"]["direction"],
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        load_if_exists=True,
    )
    # Jobs side by side keep away from each other; a study that goes on does not draw its first values again.
    seed = (config["seed"] + len(study.trials)) % 2**32
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, constant_liar=True)
    return study


def _again(optuna: Any, study: Any) -> None:
    """Queue what an earlier command left unfinished, each in the folder that it had."""
    states = optuna.trial.TrialState
    newest = {trial.user_attrs.get(KEPT_AS, trial.number): trial for trial in study.trials}
    for number, trial in newest.items():
        if trial.state == states.RUNNING:
            study.tell(trial.number, state=states.FAIL)
        if trial.state in (states.RUNNING, states.FAIL):
            study.enqueue_trial(trial.params, user_attrs={KEPT_AS: number})


class _Search:
    """The running trials of a study."""

    def __init__(self, optuna: Any, study: Any, sweep: Config, spaces: Config, job_for: Callable[[Any], Job]) -> None:
        self.states, self.study, self.settings, self.spaces = optuna.trial.TrialState, study, sweep, spaces
        self.job_for = job_for
        self.trials: dict[int, Any] = {}  # job number -> trial
        self.pruned: set[int] = set()
        self.failed: dict[int, str] = {}

    def run(self) -> dict[int, str]:
        """Ask, run, tell. A failed job counts as ended, so that what always fails does not go on for ever."""
        sweep = self.settings
        ended, pool = self._ended(), Pool(sweep["n_jobs"], sweep["time_limit"])
        with progress() as bar, closing(pool):
            task = bar.add_task("jobs", total=sweep["trials"], completed=ended, failed=0)
            while ended + len(pool.running) < sweep["trials"] or pool.running:
                while ended + len(pool.running) < sweep["trials"] and not pool.full:
                    trial = self.study.ask(self.spaces)
                    job = self.job_for(trial)
                    self.trials[job.number] = trial
                    pool.start(job)
                found = pool.wait(LOOK_EVERY if sweep["prune"] else None)
                if found:
                    self._tell(*found)
                    ended += 1
                    bar.update(task, advance=1, failed=len(self.failed))
                else:
                    self._prune(pool)
        return self.failed

    def _ended(self) -> int:
        return sum(trial.state in (self.states.COMPLETE, self.states.PRUNED) for trial in self.study.trials)

    def _tell(self, job: Job, reason: str) -> None:
        trial = self.trials.pop(job.number)
        summary = json.loads(job.summary.read_text()) if job.summary and not reason else None
        score = value(summary, self.settings["objective"])
        if job.number in self.pruned:
            self.study.tell(trial, state=self.states.PRUNED)
        elif score is not None:
            self.study.tell(trial, score)
        else:
            self.study.tell(trial, state=self.states.FAIL)
            self.failed[job.number] = reason or f"summary.json has no {self.settings['objective']}"

    def _prune(self, pool: Pool) -> None:
        """Tell the study what running jobs have measured since, and end those that are behind."""
        for job in [one.job for one in pool.running if one.job.number not in self.pruned]:
            trial, metric = self.trials[job.number], self.settings["prune"]
            lines = job.metrics.read_text().splitlines() if job.metrics else []
            seen = self.study._storage.get_trial(trial._trial_id).intermediate_values
            for row in filter(None, map(_read, lines)):
                if metric in row and row["step"] not in seen:
                    trial.report(row[metric], row["step"])
            if trial.should_prune():
                self.pruned.add(job.number)
                pool.stop(job)


def _read(line: str) -> Config | None:
    """A line of metrics.jsonl; None for one that is still being written."""
    try:
        return json.loads(line)
    except ValueError:
        return None
