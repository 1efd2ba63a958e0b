"""The same sweep by W&B: its server chooses, agents on any number of machines run our jobs."""

from pathlib import Path
from typing import Any

import yaml

from ftcore.console import plain, typed
from ftcore.errors import ConfigError, FtcoreError
from ftcore.settings import Config, Node
from ftcore.sweeps.job import folder_of
from ftcore.sweeps.sweep import read_sweep


class NotRegistered(FtcoreError):  # noqa: N818
    """W&B's server did not take the sweep."""


def wandb_sweep(arguments: Node, words: list[str], config_dirs: tuple[Path, ...]) -> None:
    """Write the W&B form of a sweep and, with a key at hand and not `dry_run`, register it.

    Raises `ConfigError` for a search that is none, `NotRegistered` when the server does not take it.
    """
    from ftcore.train.loggers import has_key

    fixed, searched, config = read_sweep(words, config_dirs)
    logger = config["logger"]
    if not logger or "project" not in logger:
        raise ConfigError("wandb_sweep needs logger=wandb: its server reads each job's score there.")
    flags = [f"--config-dir={folder.resolve()}" for folder in config_dirs]
    kept = [word for word in fixed if not word.startswith("dry_run=")]
    settings = as_wandb(config, logger, searched, [*flags, *kept])
    folder = folder_of(config, searched)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "wandb-sweep.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    if config["dry_run"] or logger["mode"] == "offline" or not has_key():
        plain.print(f"Written, not registered: {file}")
        plain.print(f"Register it with: {typed('wandb', 'sweep', '--project', logger['project'], file)}")
    else:
        _register(settings, logger)


def as_wandb(config: Config, logger: Node, searched: Node, words: list[str]) -> Node:
    """What W&B calls a sweep configuration (docs.wandb.ai/guides/sweeps/sweep-config-keys)."""
    return {
        "name": config["name"],
        "project": logger["project"],
        "method": "bayes" if config["sampler"] == "tpe" else "grid",
        "metric": {"name": config["sweep"]["objective"], "goal": config["sweep"]["direction"]},
        "parameters": {key: _parameter(key, values, config["sampler"]) for key, values in searched.items()},
        "command": ["${env}", "${interpreter}", "-m", "ftcore", *words, "${args_no_hyphens}"],
    }


def _parameter(key: str, values: object, sampler: str) -> Node:
    if isinstance(values, list):
        return {"values": values}
    if sampler == "grid" or not isinstance(values, dict) or not {"low", "high"} <= values.keys():
        raise ConfigError(f"search.{key} must be a list of values, or for sampler=tpe a range with low and high.")
    whole = all(isinstance(values[word], int) for word in {"low", "high", "step"} & values.keys())
    stepped = "step" in values or (whole and values.get("log"))
    kind = "log_uniform_values" if values.get("log") else "int_uniform" if whole and not stepped else "uniform"
    step = {"distribution": f"q_{kind}", "q": values.get("step", 1)} if stepped else {"distribution": kind}
    return {"min": values["low"], "max": values["high"], **step}


def _register(settings: Node, logger: Node) -> None:
    import wandb

    entity, project = str(logger["entity"] or ""), str(logger["project"])
    try:
        number = wandb.sweep(dict[str, Any](settings), entity=entity or None, project=project)
    except Exception as error:  # of wandb, requests or its service: there is no common class
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise NotRegistered(f"W&B did not take the sweep: {reason}") from None
    agent = typed("wandb", "agent", "/".join(filter(None, (entity, project, number))))
    plain.print(f"Start as many agents as you like, each with: {agent}")
