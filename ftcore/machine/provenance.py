"""Versions and machine that a result was made with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TypedDict

from ftcore import __version__
from ftcore.machine.hardware import cpu_fact, cuda_devices
from ftcore.settings import Config, Hardware

PACKAGES = ("torch", "transformers", "peft", "lightning", "tokenizers", "numpy")


class MadeWith(TypedDict):
    """Versions of packages, and what of the machine decides how numbers are rounded. Never a name of a host."""

    versions: dict[str, str | None]
    machine: dict[str, str | int]


def made_with(config: Config) -> MadeWith:
    """Versions and machine of this process, as summary.json keeps them."""
    rewards = config["method"].get("rewards", [])
    uses_trl = isinstance(rewards, list) and any(str(name).startswith("trl.") for name in rewards)
    versions: dict[str, str | None] = {"ftcore": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in (*PACKAGES, *(["trl"] if uses_trl else []))}
    return {"versions": versions, "machine": _machine(config["hardware"])}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine(hardware: Hardware) -> dict[str, str | int]:
    device = "CPU"
    if hardware["accelerator"] != "cpu" and cuda_devices():
        import torch

        device = torch.cuda.get_device_name(0)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpu_fact("model name") or platform.processor(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        "device": device,
        "processes": hardware["devices"] * hardware["num_nodes"],
        "precision": str(hardware["precision"]),
    }
