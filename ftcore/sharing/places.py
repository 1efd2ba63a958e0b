"""Files and folders of the user's own that a config names."""

from collections.abc import Iterator
from pathlib import Path

from ftcore.config.roles import files_of_config, role_of
from ftcore.errors import ConfigError
from ftcore.files import SCHEME, expanded, resolve
from ftcore.settings import Config

RECIPE = "recipe.yaml"


def own_places(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of every file or folder of the user's own; a name of the hub is none."""
    for key, value in files_of_config(config):
        is_name = role_of(key, config).path == "weights" and value[0] not in "/~" and not Path(resolve(value)).exists()
        if not value.startswith(SCHEME) and not is_name:
            yield key, value


def recipe_file(path: str | None) -> Path:
    """The file that `recipe=` names. Raises `ConfigError` when there is none."""
    if not path:
        raise ConfigError("Which recipe? Give recipe=<file>, such as recipe=recipe.yaml.")
    file = expanded(path)
    if not file.is_file():
        raise ConfigError(f"There is no recipe file {file.absolute()}.")
    return file
