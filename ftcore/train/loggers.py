"""Where metrics go: metrics.jsonl in the run folder always, an experiment tracker beside it when asked for.

What `_target_` of a logger's option names gets the run folder and the config, and returns a list of Lightning loggers. One with
`keep_until` forgets the steps that a run which goes on takes again; one with `log_summary` gets the numbers of summary.json.
"""

import hashlib
import json
import logging
import math
import os
import re
import sqlite3
import sys
from collections.abc import Mapping
from contextlib import closing
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ftcore.config.tree import flatten
from ftcore.errors import ConfigError
from ftcore.machine.processes import rank_and_world
from ftcore.run_folder import Run, keep_lines
from ftcore.settings import Role

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# Seconds to wait for W&B's server when a run has ended.
PATIENCE = 60
# What a tracker imports that nothing else of ftcore does. The extra of the same name installs it; the target's name holds it.
EXTRAS = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}


class JSONLines(Logger):
    """metrics.jsonl: one line per optimizer step, and one per validation."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.file = run.metrics_file

    @property
    def name(self) -> str:
        """Folder name of this logger's files; there is none."""
        return ""

    @property
    def version(self) -> str:
        """Version of this logger's files; there is none."""
        return ""

    def keep_until(self, step: int) -> None:
        """Forget what was written after `step`, half a line included: a run that goes on writes it again."""
        if rank_and_world()[0] == 0:
            keep_lines(self.file, lambda written: written <= step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line; JSON has no NaN, so what is not finite is null."""
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
    """A W&B run in the run folder. It holds the config but neither the command line nor the environment.

    Without a key, or when the server does not answer within 20 s, it writes offline and says how to upload.
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
    options = {
        "project": project,
        "entity": entity,
        "group": group,
        "tags": tags,
        "name": f"{config['name']}/{folder.name}",
        # The same run again when a stopped one goes on in its folder.
        "id": hashlib.sha256(str(folder).encode()).hexdigest()[:16],
        "resume": "allow",
        "reinit": "finish_previous",  # a run that failed earlier in this process would be gone on with instead
    }
    common: dict[str, Any] = {**options, "dir": folder, "config": config, "settings": settings}
    try:
        run = wandb.init(**common, mode="offline" if offline else "online")
    except wandb.errors.Error as error:
        print(f"W&B did not start ({type(error).__name__}); trying offline.", file=sys.stderr)
        try:
            run = wandb.init(**common, mode="offline")
        except wandb.errors.Error as again:
            reason = str(again).splitlines()[0]
            raise ConfigError(
                f"W&B refuses the logger's settings: {reason} Correct logger.*, or use logger=none."
            ) from None
    return [WandbLogger(experiment=run)]


@wraps(wandb_logger, assigned=["__annotations__"])  # the schema reads the same parameters here
def wandb_and_tensorboard(folder: Path, config: dict[str, Any], /, **wandb: Any) -> list[Logger]:
    """A W&B run, which comes first, and TensorBoard's event files."""
    return [*wandb_logger(folder, config, **wandb), *tensorboard_logger(folder, config)]


def tensorboard_logger(folder: Path, config: dict[str, Any], /) -> list[Logger]:
    """TensorBoard's event files in the run folder."""
    return [TensorBoard(folder, config)]


def mlflow_logger(folder: Path, config: dict[str, Any], /) -> list[Logger]:
    """An MLflow store in the run folder."""
    return [MLflow(folder, config)]


class TensorBoard(TensorBoardLogger):
    """Event files in tensorboard/ of the run folder, whose numbers are float32. The config is in hparams.yaml beside them."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        super().__init__(folder, name="", version="tensorboard", default_hp_metric=False)
        self.hparams = hyperparameters(config)
        # Lightning would leave an earlier one as it is, and some settings may change when a run goes on.
        Path(self.log_dir, self.NAME_HPARAMS_FILE).unlink(missing_ok=True)

    @rank_zero_only
    def keep_until(self, step: int) -> None:
        """Tell readers to forget what was written after `step`: a run that goes on writes it again."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        restart = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self.experiment._get_file_writer().add_event(restart)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write them out at once: what a checkpoint follows must be in the file when the run is killed."""
        super().log_metrics(metrics, step)
        self.experiment.flush()

    def log_summary(self, figures: dict[str, float], step: int) -> str:
        """The last numbers, also beside the config as TensorBoard's HPARAMS. Returns how to look at them."""
        self.log_hyperparams(self.hparams, figures, step)
        self.finalize("success")
        return f"TensorBoard: tensorboard --logdir {self.log_dir}"


class MLflow(MLFlowLogger):
    """One run in an SQLite store, mlflow.db of the run folder, found again when the run goes on.

    Nothing leaves the machine, and nothing is kept of user, host, command line or repository.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before the first import, which would send
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # or it tells how it makes the store's tables
        self.file = folder.resolve() / "mlflow.db"
        self.uri = f"sqlite:///{self.file}"
        super().__init__(tracking_uri=self.uri, run_id=_mlflow_run(MlflowClient(self.uri), config["name"], folder.name))
        self._sql("DELETE FROM params")  # MLflow refuses to change one, and some settings may change when a run goes on
        self.log_hyperparams(hyperparameters(config))

    @rank_zero_only
    def keep_until(self, step: int) -> None:
        """Forget what was written after `step`: a run that goes on writes it again."""
        for table in ("metrics", "latest_metrics"):
            self._sql(f"DELETE FROM {table} WHERE step > ?", step)
        self.experiment.update_run(self.run_id, status="RUNNING")

    def log_summary(self, figures: dict[str, float], step: int) -> str:
        """The last numbers. Returns how to look at them."""
        self.log_metrics(figures, step)
        return f"MLflow: mlflow ui --backend-store-uri {self.uri} (a command of the package mlflow)"

    def _sql(self, statement: str, *values: int) -> None:
        """What MLflow's client has no call for."""
        with closing(sqlite3.connect(self.file)) as store, store:
            store.execute(statement, values)


def _mlflow_run(client: "MlflowClient", experiment: str, name: str) -> str:
    """The id of the store's run, which is made if there is none yet. Lightning would tag it with user and repository."""
    known = {found.name: found.experiment_id for found in client.search_experiments()}
    for run in client.search_runs(list(known.values())):
        return run.info.run_id
    number = known.get(experiment) or client.create_experiment(experiment)
    return client.create_run(number, run_name=name).info.run_id


def check_installed(target: str) -> None:
    """Refuse a tracker, named by its `_target_`, whose packages are not installed. Raises `ConfigError`."""
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if not find_spec(module)]
        if extra in target and missing:
            raise ConfigError(
                f"This logger needs {', '.join(missing)}: pip install 'ftcore[{extra}]'. Without it use logger=none."
            )


def hyperparameters(config: dict[str, Any]) -> dict[str, Any]:
    """The config as flat names and values, in the characters that MLflow takes.

    >>> hyperparameters({"method": {"lr": 1e-4, "reward:options": {}}, "seed": 0})
    {'method.lr': 0.0001, 'method.reward_options': {}, 'seed': 0}
    """
    return {re.sub(r"[^\w.-]", "_", path): value for path, value in flatten(config)}


def wandb_hint(logger: WandbLogger) -> str:
    """Where the run can be seen, or the command that uploads it."""
    run = logger.experiment
    online = run.settings.mode == "online"
    return f"W&B: {run.url}" if online else f"W&B wrote offline; upload with: wandb sync {wandb_files(logger)}"


def wandb_files(logger: WandbLogger) -> Path:
    """The folder on this machine that `wandb sync` takes."""
    return Path(logger.experiment.dir).parent


def has_key() -> bool:
    """Whether W&B's server would let us in: its key is in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")
