"""`check`: everything that is wrong with a recipe, without a model."""

from collections.abc import Iterator
from pathlib import Path

from ftcore.config.build import record_type, schemas
from ftcore.config.compose import load_config
from ftcore.config.tree import leaves
from ftcore.errors import DataError
from ftcore.files import SCHEME, resolve
from ftcore.settings import Config
from ftcore.sharing.places import PLACES, ROWS, console, own_words, recipe_file


def check(words: list[str], config_dirs: tuple[Path, ...]) -> None:
    """Say all that is wrong with a recipe, or what it would train; no model is loaded. Raises `ConfigError` with all of it."""
    given, rest = own_words(words, ("recipe",))
    recipe = recipe_file(given) if given else None
    config = load_config(rest, config_dirs, recipe, _absent)
    choices = config["choices"]
    model = config["model"]["path"] or choices["model"]
    rows = f" ({config['data']['path']})" if config["data"]["path"] else ""
    limits = [f"{config['max_steps']} steps"] if config["max_steps"] else []
    limits += [f"{config['max_epochs']:g} passes over the rows"] if config["max_epochs"] else []
    told = "the command line" if recipe is None else recipe
    console.print(
        f"Nothing is wrong with {told}. It would train method={choices['method']} on data={choices['data']}{rows}, "
        f"model={choices['model']} ({model}) with adapter={choices['adapter']}, for {' or '.join(limits)}"
        f"{' (what is less)' * (len(limits) > 1)}, {config['global_batch_size']} rows a step, seed {config['seed']}, on "
        f"hardware={choices['hardware']}; logger={choices['logger']}, as {config['output_dir']}/{config['name']}."
    )


def _absent(config: Config) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for rows and weights that are not there, as far as names tell."""
    from ftcore.data.sources import files_of

    for key, value in leaves(config):
        if not PLACES.fullmatch(key) or not isinstance(value, str):
            continue
        if key == "model.path" or key.startswith("method."):
            local = value.startswith((SCHEME, "/", "~", ".")) or value.count("/") > 1
            if local and not Path(resolve(value)).is_dir():
                yield key, f"names no folder: {Path(resolve(value)).absolute()}"
        elif ROWS.match(key):
            try:
                files_of(value)
            except DataError as error:
                yield key, f"cannot be read: {error}"
    yield from _rows_of_another_type(config)


def _rows_of_another_type(config: Config) -> Iterator[tuple[str, str]]:
    """A method and a data option that do not go together."""
    from ftcore.data.records import DERIVED

    have, target = (config.get("data") or {}).get("records"), (config.get("method") or {}).get("_target_")
    if not isinstance(have, dict) or not have or target not in schemas()["record_types"]:
        return
    needed = record_type({"_target_": target})
    if not {needed, DERIVED.get(needed)} & set(have):
        yield "data.records", f"has no {needed} rows, which the method needs; it has {', '.join(have)}"
