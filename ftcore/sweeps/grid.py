"""Sweeps over every combination of listed values."""

import itertools
from pathlib import Path

from ftcore.config.compose import load_config
from ftcore.errors import ConfigError
from ftcore.models.weights import check_weights
from ftcore.settings import Node
from ftcore.sweeps.job import Job, as_word, job_of
from ftcore.sweeps.pool import Source

WEIGHTLESS = ("plan", "inspect")  # verbs that load no weights


class Grid(Source):
    """Every combination of the values in `search`, the last key changing fastest; `shared` are the words of all jobs.

    Raises `FtcoreError` for values that are no list, and for the first job whose config is wrong or whose weights are damaged.
    """

    def __init__(self, search: Node, shared: list[str], config_dirs: tuple[Path, ...], folder: Path) -> None:
        lists = []
        for key, values in search.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"search.{key}: sampler=grid needs a list of values; ranges are for sampler=tpe.")
            lists.append([(key, as_word(value)) for value in values])
        self.jobs = [job_of(k, dict(pairs), shared, folder) for k, pairs in enumerate(itertools.product(*lists))]
        words = ([word for word in job.words if not word.startswith("--")] for job in self.jobs)
        configs = [load_config(of_job, config_dirs) for of_job in words]
        models = [config["model"] for config in configs if config["verb"] not in WEIGHTLESS]
        for model in {str(model): model for model in models}.values():
            check_weights(model)
        self.total, self.done = len(self.jobs), sum(job.finished for job in self.jobs)
        self._unfinished = (job for job in self.jobs if not job.finished)

    def ask(self) -> Job | None:
        """The next job that is not finished."""
        return next(self._unfinished, None)
