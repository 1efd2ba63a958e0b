"""The options of each group: files of conf/ and of the user's own folders."""

import os
from collections.abc import Iterable
from pathlib import Path

from ftcore.files import resources
from ftcore.settings import FILES


def options(group: str, config_dirs: Iterable[Path] = ()) -> list[str]:
    """Names that `group=<name>` accepts, sorted. Files with a leading underscore hold shared keys and are no options."""
    return sorted({file.stem for folder in folders(group, config_dirs) for file in folder.glob("[!_]*.yaml")})


def folders(group: str, config_dirs: Iterable[Path] = ()) -> list[Path]:
    """Folders with options of a group. Recipes and sweeps: of FTCORE_RECIPES, then of --config-dir, the shipped ones last."""
    own = [folder / group for folder in config_dirs]
    if group not in FILES:
        return [resources() / "conf" / group, *own]
    team = [Path(entry) for entry in os.environ.get("FTCORE_RECIPES", "").split(os.pathsep) if entry]
    return [*team, *own, resources() / group]
