"""Whose code may run: ftcore's, and modules that the command line trusts; the processes of a run hear it by environment."""

import os
from collections.abc import Iterable

from ftcore.errors import PRIVATE
from ftcore.settings import Config

TRUSTED = "FTCORE_TRUST"


def is_trusted(name: str, trust: Iterable[str]) -> bool:
    """Whether a dotted name lies in one of the modules that the command line trusts."""
    return any(name.startswith(f"{module}.") for module in trust)


def hand_down(config: Config) -> None:
    """Tell this process, and those that it starts, whose code may run and whether text of rows may be shown."""
    os.environ[TRUSTED] = ",".join(config["trust"])
    os.environ[PRIVATE] = str(int(config["private"]))


def trusted() -> list[str]:
    """The modules that `hand_down` has told of."""
    return [name for name in os.environ.get(TRUSTED, "").split(",") if name]
