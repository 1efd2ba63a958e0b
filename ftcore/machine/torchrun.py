"""Processes that torchrun or a SLURM job started: the first one decides what is run, and tells the others."""

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from ftcore.settings import Config

Plan = tuple[Config, Path, Path | None]


# Its rows are read and its stages looked up before the first process has anything to tell.
PATIENCE = timedelta(hours=6)


def started() -> bool:
    """Whether somebody else started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """The number of this process; 0 for one that stands alone."""
    return int(os.environ["RANK"]) if started() else 0


def world_size() -> int:
    """How many were started together."""
    return int(os.environ["WORLD_SIZE"])


def tell(plan: Plan | None) -> Any:
    """Let the other processes do `plan`; nothing, with None. What is returned must be kept until they have ended."""
    store = _store()
    store.set("ftcore", json.dumps(plan, default=str))
    return store


def told() -> Plan | None:
    """What the first process tells, once it does."""
    plan = json.loads(_store().get("ftcore"))
    return (plan[0], Path(plan[1]), plan[2] and Path(plan[2])) if plan else None


def _store() -> Any:
    """torchrun's store; where there is none, one of the first process beside the port that training will use."""
    from torch.distributed import TCPStore

    theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = int(os.environ["MASTER_PORT"]) + (not theirs)
    return TCPStore(os.environ["MASTER_ADDR"], port, is_master=not theirs and rank() == 0, timeout=PATIENCE)
