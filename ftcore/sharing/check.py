"""`check`: everything that is wrong with a recipe, without a model."""

from collections.abc import Iterator
from pathlib import Path

from ftcore.config.build import record_type, schemas
from ftcore.config.compose import load_config, of_run
from ftcore.config.roles import files_of_config
from ftcore.console import plain
from ftcore.data.records import DERIVED
from ftcore.data.sources import files_of
from ftcore.errors import DataError
from ftcore.files import SCHEME, resolve
from ftcore.settings import FILES, CheckArguments, Config
from ftcore.sharing.cycles import load_cycles, read_cycles
from ftcore.sharing.places import recipe_file


def check(arguments: CheckArguments, words: list[str], config_dirs: tuple[Path, ...]) -> dict[str, object]:
    """Say all that is wrong with a recipe, or what it would train; no model is loaded. Raises `ConfigError` with all of it.

    Of a package of cycles all recipes are checked.
    """
    recipe = recipe_file(arguments["recipe"]) if arguments["recipe"] else None
    if recipe and (cycles := read_cycles(recipe)):
        *_, config = load_cycles(cycles, words, config_dirs, _missing)
    else:
        config = load_config(words, config_dirs, recipe, _missing)
    choices, path = config["choices"], config["data"]["path"]
    named = " and ".join(f"{group}={choices[group]}" for group in FILES if choices[group])
    limits = [f"{config['max_steps']} steps"] if config["max_steps"] else []
    limits += [f"{config['max_epochs']:g} passes over the rows"] if config["max_epochs"] else []
    plain.print(
        f"Nothing is wrong with {recipe or named or 'the command line'}. It would train method={choices['method']} on "
        f"data={choices['data']}{f' ({path})' if path else ''}, model={choices['model']} "
        f"({config['model']['path'] or choices['model']}) with adapter={choices['adapter']}, "
        f"for {' or '.join(limits)}{' (what is less)' * (len(limits) > 1)}, {config['global_batch_size']} rows a step, "
        f"seed {config['seed']}, on hardware={choices['hardware']}; "
        f"logger={choices['logger']}, as {config['output_dir']}/{config['name']}."
    )
    return {"recipe": str(recipe) if recipe else None, "config": of_run(config)}


def _missing(config: Config) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for rows and weights that are not there, as far as names tell, or that the method cannot use."""
    for key, value in files_of_config(config, "weights"):
        local = value.startswith((SCHEME, "/", "~", ".")) or value.count("/") > 1
        if local and not Path(resolve(value)).is_dir():
            yield key, f"names no folder: {Path(resolve(value)).absolute()}"
    for key, value in files_of_config(config, "rows"):
        try:
            files_of(value)
        except DataError as error:
            yield key, f"cannot be read: {error}"
    have, target = (config.get("data") or {}).get("records"), (config.get("method") or {}).get("_target_")
    if isinstance(have, dict) and have and target in schemas()["record_types"]:
        needed = record_type({"_target_": target})
        if not {needed, DERIVED.get(needed)} & set(have):
            yield "data.records", f"has no {needed} rows, which the method needs; it has {', '.join(have)}"
