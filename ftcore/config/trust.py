"""Whose code may run: ftcore's, and modules that the command line trusts. Processes of a run read it from the environment."""

import os
from collections.abc import Iterable

from ftcore.errors import PRIVATE
from ftcore.settings import Config

TRUSTED = "FTCORE_TRUST"


def is_trusted(name: str, trust: Iterable[str]) -> bool:
    """Whether a dotted name lies in one of the modules that the command line trusts."""
    return any(name.startswith(f"{module}.") for module in trust)


def hand_down(config: Config) -> None:
    """Put into the environment, for this process and those it starts, whose code may run and whether rows may be shown."""
    os.environ[TRUSTED] = ",".join(config["trust"])
    os.environ[PRIVATE] = str(int(config["private"]))


def trusted() -> list[str]:
    """The trusted modules, from the environment."""
    return [name for name in os.environ.get(TRUSTED, "").split(",") if name]
