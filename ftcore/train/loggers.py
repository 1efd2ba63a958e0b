"""Where metrics go: always to metrics.jsonl in the run folder, and to an experiment tracker if the config names one.

The `_target_` of a logger option is a function that gets the run folder and the config, and returns a list of Lightning loggers.
A logger may have `keep_until(step)`, which deletes later steps because a resumed run takes them again, and
`log_summary(numbers, steps)`, which gets the numbers of summary.json and returns how to look at them.
"""

import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ftcore.config.tree import flatten
from ftcore.console import stderr, typed
from ftcore.data.layouts import in_batches
from ftcore.errors import ConfigError
from ftcore.files import expanded
from ftcore.machine.processes import rank_and_world
from ftcore.run_folder import Run, keep_lines
from ftcore.settings import Role

# Seconds to wait for W&B's server when a run has ended.
PATIENCE = 60
# What the environment may say to W&B.
WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
# Extra of pip -> the modules that it installs for a tracker. The names of the trackers' functions contain that of the extra.
EXTRAS = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}


class JSONLines(Logger):
    """metrics.jsonl: one line per optimizer step, and one per validation."""

    name = version = ""  # of a folder for files: there is none

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.file = run.metrics_file

    def keep_until(self, step: int) -> None:
        """Delete the lines after `step`, and one that is cut off: a resumed run writes them again."""
        if rank_and_world()[0] == 0:
            keep_lines(self.file, lambda written: written <= step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line. JSON has no NaN: what is not finite becomes null."""
        metrics = {key: value if math.isfinite(value) else None for key, value in metrics.items()}  # type: ignore[misc]
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **metrics}) + "\n")


def wandb_logger(
    folder: Path,
    config: dict[str, Any],
    /,
    *,
    project: str,
    entity: Annotated[str | None, Role("place", recipe=True)],
    group: Annotated[str | None, Role("place", recipe=True)],
    tags: list[str],
    mode: Literal["online", "offline", "auto"],
) -> list[Logger]:
    """A W&B run in the run folder. It holds the config, but neither the command line nor the environment.

    Without a key, or if the server does not answer within 20 s, it writes offline; the report says how to upload.
    """
    import wandb

    offline = mode == "offline" or (mode == "auto" and not has_key())
    settings = wandb.Settings(
        x_disable_meta=True,
        x_disable_stats=True,
        console="off",
        save_code=False,
        init_timeout=20,
        finish_timeout=PATIENCE,
        finish_timeout_raises=True,
        silent=True,
        disable_git=True,
    )
    options: dict[str, Any] = {
        "project": project,
        "entity": entity,
        "group": group,
        "tags": tags,
        "name": f"{config['name']}/{folder.name}",
        # A run that is resumed in its folder is the same run in W&B.
        "id": hashlib.sha256(str(folder).encode()).hexdigest()[:16],
        "resume": "allow",
        "reinit": "finish_previous",  # a run that failed earlier in this process would be gone on with instead
        "dir": folder,
        "config": config,
        "settings": settings,
    }
    try:
        run = wandb.init(**options, mode="offline" if offline else "online")
    except Exception as error:  # of wandb, requests or its service: they have no common class
        stderr.print(f"W&B did not start ({type(error).__name__}); trying offline.")
        try:
            run = wandb.init(**options, mode="offline")
        except Exception as again:
            reason = (str(again).splitlines() or [type(again).__name__])[0]
            raise ConfigError(
                f"W&B refuses the logger's settings: {reason} Correct logger.*, or use logger=none."
            ) from None
    return [Wandb(folder, run)]


class Wandb(WandbLogger):
    """A W&B run. One that is written offline has its steps from metrics.jsonl again after a resume.

    A folder that is synced replaces an earlier one of the same run, so the last one holds all.
    """

    def __init__(self, folder: Path, run: Any) -> None:
        super().__init__(experiment=run)
        self.run = Run(folder)

    @rank_zero_only
    def keep_until(self, step: int) -> None:
        """Log the steps up to `step` again, where no server has them."""
        if self.experiment.settings.mode != "offline":
            return
        for line in self.run.metrics():
            if line["step"] <= step:
                kept = {key: math.nan if value is None else value for key, value in line.items() if key != "step"}
                self.log_metrics(kept, int(line["step"]))


@wraps(wandb_logger, assigned=["__annotations__"])  # the schema reads the same parameters here
def wandb_and_tensorboard(folder: Path, config: dict[str, Any], /, **wandb: Any) -> list[Logger]:
    """A W&B run, which is first in the list, and TensorBoard's event files."""
    return [*wandb_logger(folder, config, **wandb), *tensorboard_logger(folder, config)]


def tensorboard_logger(folder: Path, config: dict[str, Any], /) -> list[Logger]:
    """TensorBoard's event files in the run folder."""
    return [TensorBoard(folder, config)]


def mlflow_logger(folder: Path, config: dict[str, Any], /) -> list[Logger]:
    """An MLflow store in the run folder."""
    return [MLflow(folder, config)]


class TensorBoard(TensorBoardLogger):
    """Event files (float32) in tensorboard/ of the run folder, with the config in hparams.yaml beside them."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        super().__init__(folder, name="", version="tensorboard", default_hp_metric=False)
        self.hparams = hyperparameters(config)
        # Lightning would keep an earlier file, and some settings may change when a run is resumed.
        Path(self.log_dir, self.NAME_HPARAMS_FILE).unlink(missing_ok=True)

    @rank_zero_only
    def keep_until(self, step: int) -> None:
        """Tell readers to ignore what was written after `step`: a resumed run writes it again."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        restart = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self.experiment._get_file_writer().add_event(restart)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write them to the file at once: they must be there when a run is killed after a checkpoint."""
        super().log_metrics(metrics, step)
        self.experiment.flush()

    def log_summary(self, numbers: dict[str, float], step: int) -> str:
        """Log the summary, also for TensorBoard's HPARAMS page. Returns how to look at it."""
        self.log_hyperparams(self.hparams, numbers, step)
        self.finalize("success")
        return f"TensorBoard: {typed('tensorboard', '--logdir', self.log_dir)}"


class MLflow(MLFlowLogger):
    """A run in an SQLite store, mlflow.db of the run folder.

    A resumed run is a new run of the store, since MLflow cannot delete steps or change parameters, and takes over the steps up
    to the checkpoint. The earlier one goes into MLflow's trash. Nothing leaves the machine, and nothing is kept of user, host,
    command line or repository.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before the first import, which would send
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it would report how it makes the store's tables
        if {"?", "%"} & set(str(folder)):
            raise ConfigError(
                f"logger=mlflow names its store by a URL, which cannot hold the ? or % of {folder}: rename it."
            )
        self.run, self.uri = Run(folder), f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        client = MlflowClient(self.uri)
        experiments = {found.name: found.experiment_id for found in client.search_experiments()}
        for earlier in client.search_runs(list(experiments.values())):
            client.delete_run(earlier.info.run_id)
        experiment = experiments.get(config["name"]) or client.create_experiment(config["name"])
        # Made here, because Lightning would tag it with user and repository.
        super().__init__(tracking_uri=self.uri, run_id=client.create_run(experiment, run_name=folder.name).info.run_id)
        self.log_hyperparams(hyperparameters(config))

    @rank_zero_only
    def keep_until(self, step: int) -> None:
        """Log the steps up to `step` again, from metrics.jsonl."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(key, math.nan if value is None else value, now, int(line["step"]))
            for line in self.run.metrics()
            for key, value in line.items()
            if key != "step" and line["step"] <= step
        ]
        for batch in in_batches(metrics, 1000):  # MLflow takes no more at once
            self.experiment.log_batch(self.run_id, batch)

    def log_summary(self, numbers: dict[str, float], step: int) -> str:
        """Log the summary. Returns how to look at it."""
        self.log_metrics(numbers, step)
        return f"MLflow: {typed('mlflow', 'ui', '--backend-store-uri', self.uri)} (a command of the package mlflow)"


def check_installed(target: str) -> None:
    """Raise `ConfigError` for a tracker, given by its `_target_`, whose packages are not installed."""
    mode = os.environ.get("WANDB_MODE")
    if "wandb" in target and mode is not None and mode not in WANDB_MODES:
        raise ConfigError(
            f"WANDB_MODE={mode!r} is none of {', '.join(WANDB_MODES)}. Correct it, unset it, or use logger=none."
        )
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if not find_spec(module)]
        if extra in target and missing:
            raise ConfigError(
                f"This logger needs {', '.join(missing)}: pip install 'ftcore[{extra}]'. Without it use logger=none."
            )


def hyperparameters(config: dict[str, Any]) -> dict[str, Any]:
    """The config as one mapping of dotted names, in the characters that MLflow allows.

    >>> hyperparameters({"method": {"lr": 1e-4, "reward:options": {}}, "seed": 0})
    {'method.lr': 0.0001, 'method.reward_options': {}, 'seed': 0}
    """
    return {re.sub(r"[^\w.-]", "_", path): value for path, value in flatten(config)}


def wandb_hint(logger: WandbLogger) -> str:
    """The run's URL, or the command that uploads it."""
    run = logger.experiment
    online = run.settings.mode == "online"
    return f"W&B: {run.url}" if online else f"W&B wrote offline; upload with: {wandb_sync(logger)}"


def wandb_sync(logger: WandbLogger) -> str:
    """The command that uploads a run, also one that began online and lost its server."""
    return typed("wandb", "sync", "--no-skip-online", Path(logger.experiment.dir).parent)


def has_key() -> bool:
    """Whether there is a key for W&B's server, in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = expanded(os.environ.get("NETRC") or "~/.netrc")
    return netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")
