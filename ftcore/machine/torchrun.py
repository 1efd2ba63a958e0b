"""Processes that torchrun or a SLURM job started: the first one decides what is run, and sends it to the others."""

import json
import os
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ftcore.settings import Config, Resolved

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# Config, what is settled, run folder, checkpoint to resume from.
Work = tuple[Config, Resolved, Path, Path | None]
# Rows are read and stages looked up before the first process has anything to send.
PATIENCE = timedelta(hours=6)


def started() -> bool:
    """Whether torchrun or SLURM launched this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """The number of this process; 0 for one that stands alone."""
    return int(os.environ["RANK"]) if started() else 0


def send(work: Work | None) -> object:
    """Let the other processes do `work`; nothing, with None. What is returned must be kept until they have ended."""
    store = _store()
    store.set("ftcore", json.dumps((work[0], asdict(work[1]), *work[2:]) if work else None, default=str))
    return store


def receive() -> Work | None:
    """What the first process sends, once it does."""
    work = json.loads(_store().get("ftcore"))
    if not work:
        return None
    config, resolved, folder, start = work
    return config, Resolved.from_json(resolved), Path(folder), Path(start) if start else None


def _store() -> "TCPStore":
    """torchrun's store; where there is none, one of the first process beside the port that training will use."""
    from torch.distributed import TCPStore

    theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = int(os.environ["MASTER_PORT"]) + (not theirs)
    return TCPStore(os.environ["MASTER_ADDR"], port, is_master=not theirs and rank() == 0, timeout=PATIENCE)
