"""Sweeps that look where it was good so far: Optuna's ask-and-tell over jobs, its study in a file of the sweep's folder.

Sampler: tree-structured Parzen estimator (Bergstra et al. 2011). With `sweep.prune`, a job whose metric is worse than the
median of the others at the same step is ended (Optuna's MedianPruner). The same command again goes on with the study: jobs that
failed or were cut off first, then new ones until `sweep.trials` have ended.
"""

import math
from pathlib import Path

from ftcore.errors import ConfigError
from ftcore.settings import Config
from ftcore.sweeps.job import Job, as_word, job_of
from ftcore.sweeps.pool import Pool, Source

try:
    import optuna
except ImportError:
    raise ConfigError("sampler=tpe needs Optuna: pip install 'ftcore[sweeps]'.") from None
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState

optuna.logging.set_verbosity(optuna.logging.WARNING)

LOOK_EVERY = 1.0  # seconds between looks at the metrics of running jobs
KEPT_AS = "job"  # attribute of a trial that repeats an earlier one: the number of that one's job


class Trials(Source):
    """Jobs that a study asks for, until `sweep.trials` have ended; `shared` are the words of all jobs.

    Those that failed count as ended, so that what always fails does not go on for ever.
    Raises `ConfigError` for a range that cannot be.
    """

    def __init__(self, config: Config, search: dict[str, object], shared: list[str], folder: Path) -> None:
        self.settings, self.shared, self.folder = config["sweep"], shared, folder
        self.spaces = {key: _distribution(key, values) for key, values in search.items()}
        self.study = _study(config, folder)
        _queue_unfinished(self.study)
        # A trial that waits has no values yet; it repeats one that has.
        begun = {_number(trial): trial for trial in self.study.trials if trial.state != TrialState.WAITING}
        self.jobs = [self._job(begun[number]) for number in sorted(begun)]
        self.total = self.settings["trials"]
        self.done = sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in self.study.trials)
        self.left = self.total - self.done
        self.look_every = LOOK_EVERY if self.settings["prune"] else math.inf
        self.running: dict[int, Trial] = {}  # by the number of the job
        self.pruned: set[int] = set()

    def ask(self) -> Job | None:
        """The job that the study wants next; None when there were enough."""
        if self.left <= 0:
            return None
        self.left -= 1
        trial = self.study.ask(self.spaces)
        failed_before = {job.number: job for job in self.jobs}.get(_number(trial))
        job = failed_before or self._job(trial)
        self.running[job.number] = trial
        self.jobs += [] if failed_before else [job]
        return job

    def tell(self, job: Job) -> None:
        """Tell the study what a job gave; one without the objective has failed."""
        trial, score = self.running.pop(job.number), job.score(self.settings["objective"])
        if job.number in self.pruned:
            job.failure = ""
            self.study.tell(trial, state=TrialState.PRUNED)
        elif score is not None and not job.failure:
            self.study.tell(trial, score)
        else:
            self.study.tell(trial, state=TrialState.FAIL)
            job.failure = job.failure or f"summary.json has no {self.settings['objective']}"

    def look(self, pool: Pool) -> None:
        """Tell the study what running jobs have measured since, and end those that are behind."""
        for job in [one.job for one in pool.running.values() if one.job.number not in self.pruned]:
            trial, metric = self.running[job.number], self.settings["prune"]
            reported = self.study._storage.get_trial(trial._trial_id).intermediate_values
            for row in job.runs[0].metrics() if job.runs else ():
                if metric in row and row["step"] not in reported:
                    trial.report(row[metric], int(row["step"]))
            if trial.should_prune():
                self.pruned.add(job.number)
                pool.stop(job)

    def _job(self, trial: Trial | FrozenTrial) -> Job:
        changes = {key: as_word(word) for key, word in trial.params.items()}
        return job_of(_number(trial), changes, self.shared, self.folder)


def _number(trial: Trial | FrozenTrial) -> int:
    """The number of a trial's job, which a trial that repeats another has from that one."""
    return int(trial.user_attrs.get(KEPT_AS, trial.number))


def _distribution(key: str, values: object) -> BaseDistribution:
    """A list is a choice; `{low, high}` a range of whole numbers or of any, on a log scale or in steps if it says so."""
    if isinstance(values, list) and values:
        return CategoricalDistribution([as_word(word) for word in values])
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= {"low", "high", "log", "step"}:
        raise ConfigError(f"search.{key} must be a list of values, or a range: low and high, and perhaps log or step.")
    whole = all(isinstance(values[word], int) for word in {"low", "high", "step"} & values.keys())
    try:
        return (IntDistribution if whole else FloatDistribution)(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"search.{key}: {error}") from None


def _study(config: Config, folder: Path) -> optuna.Study:
    """The study of this folder, begun or gone on with."""
    storage, direction = JournalStorage(JournalFileBackend(str(folder / "study.log"))), config["sweep"]["direction"]
    study = optuna.create_study(storage=storage, study_name=folder.name, direction=direction, load_if_exists=True)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
    # Jobs side by side keep away from each other; a study that goes on does not draw its first values again.
    seed = (config["seed"] + len(study.trials)) % 2**32
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, constant_liar=True)
    return study


def _queue_unfinished(study: optuna.Study) -> None:
    """Queue what an earlier command left unfinished, each in the folder that it had."""
    newest = {_number(trial): trial for trial in study.trials}
    for number, trial in newest.items():
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.state in (TrialState.RUNNING, TrialState.FAIL):
            study.enqueue_trial(trial.params, user_attrs={KEPT_AS: number})
