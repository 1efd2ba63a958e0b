"""Keys that hold a file or folder of the user's own."""

import re
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from ftcore.config.tree import leaves
from ftcore.errors import ConfigError
from ftcore.files import SCHEME, resolve
from ftcore.settings import Config

# Keys that hold a file or folder of the user's own, unless it is ftcore:// or a name of the hub.
PLACES = re.compile(
    r"model\.(path|chat_template)|data\.(path|cloze|splits\.\w+|records\.\w+\.\w+|sources\.[^.]+\.path)"
    r"|evaluate\.probe|retention\.text|method\.(policy|reward_model)"
)


WEIGHTS = {"model.path", "method.policy", "method.reward_model"}


ROWS = re.compile(r"data\.(path|splits|records|sources)\b")  # places of rows, which are compared one by one


RECIPE = "recipe.yaml"


console = Console(soft_wrap=True, highlight=False, markup=False)


def own_places(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of every file or folder of the user's own; a name of the hub is none."""
    for key, value in leaves(config):
        named = PLACES.fullmatch(key) and isinstance(value, str) and not value.startswith(SCHEME)
        if named and (key not in WEIGHTS or value[0] in "/~" or Path(resolve(value)).exists()):
            yield key, value


def not_weights(places: dict[str, str]) -> dict[str, str]:
    """Those that are not the model's own weights, which are looked at by themselves."""
    return {key: path for key, path in places.items() if key != "model.path"}


def own_words(words: list[str], names: tuple[str, ...]) -> tuple[Config, list[str]]:
    """The words that are the verb's own, as name -> value, and those of the config."""
    own = [word for word in words if word.partition("=")[0] in names]
    return dict(word.split("=", 1) for word in own), [word for word in words if word not in own]


def recipe_file(given: Config) -> Path:
    if not given.get("recipe"):
        raise ConfigError("Which recipe? Give recipe=<file>, such as recipe=recipe.yaml.")
    file = Path(given["recipe"]).expanduser()
    if not file.is_file():
        raise ConfigError(f"There is no recipe file {file.absolute()}.")
    return file
