"""What a config comes to on this machine, settled once before any process starts."""

from collections.abc import Mapping

from ftcore.config.build import build
from ftcore.files import short_hash
from ftcore.machine.hardware import micro_batch
from ftcore.settings import Config, Machine, Resolved


def settle_precision(config: Config, elsewhere: bool = False) -> None:
    """Put what null and `auto` come to on this machine into the config: results are known by it. Raises as `resolve` does."""
    if config["hardware"]["precision"] in (None, "auto"):
        config["hardware"]["precision"] = resolve(config, {}, elsewhere).machine.precision


def resolve(config: Config, hashes: Mapping[str, str], elsewhere: bool = False) -> Resolved:
    """The machine, the rows of a forward pass, and the identity of the base weights, whose files have these `hashes`.

    Raises `HardwareError` or `ConfigError` for what cannot be had here; `elsewhere`: on a machine that has all that is asked for.
    """
    machine = build(config["hardware"], Machine, elsewhere)
    rows = micro_batch(config["global_batch_size"], config["micro_batch_size"], machine.processes)
    return Resolved(machine, rows, base=short_hash(sorted(hashes.items())))
