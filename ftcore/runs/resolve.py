"""What a config comes to on this machine, settled once before any process starts."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace

from ftcore.config.build import build
from ftcore.machine.hardware import micro_batch
from ftcore.settings import Config, Machine, Resolved


def resolve(config: Config) -> Resolved:
    """The machine and the rows of a forward pass. Raises `HardwareError` or `ConfigError` for what cannot be had here."""
    machine = build(config["hardware"], Machine)
    rows = micro_batch(
        global_batch_size=config["global_batch_size"],
        micro_batch_size=config["micro_batch_size"],
        processes=machine.processes,
    )
    return Resolved(machine, rows, base="")


def with_weights(resolved: Resolved, hashes: Mapping[str, str]) -> Resolved:
    """The same with the identity of the base weights, once these are there."""
    return replace(resolved, base=hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest())
