"""Where metrics go: metrics.jsonl in the run folder always, Weights & Biases beside it when asked for."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ftcore.errors import ConfigError
from ftcore.machine.processes import rank_and_world

# Seconds to wait for W&B's server when a run has ended.
PATIENCE = 60


class JSONLines(Logger):
    """metrics.jsonl: one line per optimizer step, and one per validation."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = folder / "metrics.jsonl"

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
            keep_lines(self.file, lambda line: line["step"] <= step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line; JSON has no NaN, so what is not finite is null."""
        metrics = {key: value if math.isfinite(value) else None for key, value in metrics.items()}  # type: ignore[misc]
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **metrics}) + "\n")


def keep_lines(file: Path, wanted: Callable[[Any], bool]) -> None:
    """Leave only the JSON lines of a file that are `wanted` and whole."""
    kept = []
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, LookupError, TypeError):
            kept += [line] if wanted(json.loads(line)) else []
    file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def wandb_logger(
    folder: Path,
    config: dict[str, Any],
    /,
    *,
    project: str,
    entity: str | None,
    group: str | None,
    tags: list[str],
    mode: Literal["online", "offline", "auto"],
) -> WandbLogger:
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
    return WandbLogger(experiment=run)


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
