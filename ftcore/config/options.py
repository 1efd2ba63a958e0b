"""The options of each group: files of conf/ and of the user's own folders."""

import os
from collections.abc import Iterable
from pathlib import Path

from ftcore.files import resources
from ftcore.settings import FILES


def options(group: str, config_dirs: Iterable[Path] = ()) -> list[str]:
    """Names that `group=<name>` accepts, sorted. Files with a leading underscore hold shared keys and are no options."""
    folders = [folder / group for folder in (resources() / "conf", *config_dirs)]
    if group in FILES:
        folders = recipe_folders(tuple(config_dirs), group)
    names = {file.stem for folder in folders for file in folder.glob("*.yaml")}
    return sorted(name for name in names if not name.startswith("_"))


def recipe_folders(config_dirs: tuple[Path, ...] = (), group: str = "recipes") -> list[Path]:
    """Folders searched for recipes (or sweeps): those of FTCORE_RECIPES, then of --config-dir, then the shipped one."""
    team = [Path(entry) for entry in os.environ.get("FTCORE_RECIPES", "").split(os.pathsep) if entry]
    return [*team, *(folder / group for folder in config_dirs), resources() / group]
