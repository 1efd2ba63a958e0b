"""Processes that torchrun or a SLURM job started: the first one decides what is run, and tells the others."""

import json
import os
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ftcore.settings import Config, Resolved

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# Config, what is settled, run folder, checkpoint to go on from.
Work = tuple[Config, Resolved, Path, Path | None]
# Its rows are read and its stages looked up before the first process has anything to tell.
PATIENCE = timedelta(hours=6)


def started() -> bool:
    """Whether torchrun or SLURM launched this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """The number of this process; 0 for one that stands alone."""
    return int(os.environ["RANK"]) if started() else 0


def world_size() -> int:
    """How many were started together."""
    return int(os.environ["WORLD_SIZE"])


def tell(work: Work | None) -> object:
    """Let the other processes do `work`; nothing, with None. What is returned must be kept until they have ended."""
    store = _store()
    said = (work[0], asdict(work[1]), *work[2:]) if work else None
    store.set("ftcore", json.dumps(said, default=str))
    return store


def told() -> Work | None:
    """What the first process tells, once it does."""
    said = json.loads(_store().get("ftcore"))
    if not said:
        return None
    config, resolved, folder, start = said
    return config, Resolved.from_json(resolved), Path(folder), Path(start) if start else None


def _store() -> "TCPStore":
    """torchrun's store; where there is none, one of the first process beside the port that training will use."""
    from torch.distributed import TCPStore

    theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = int(os.environ["MASTER_PORT"]) + (not theirs)
    return TCPStore(os.environ["MASTER_ADDR"], port, is_master=not theirs and rank() == 0, timeout=PATIENCE)
