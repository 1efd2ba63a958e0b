"""A config as the words of a command line."""

import json
from collections.abc import Mapping

from ftcore.config.compose import compose, load_config, read_overrides
from ftcore.config.options import options
from ftcore.config.roles import values_of
from ftcore.config.tree import flatten
from ftcore.settings import CHOSEN, Config

KINDS = ("result", "rows", "scores", "machine")


def chosen_options(config: Config) -> dict[str, str]:
    """Group -> the option that a config was composed of, in the groups that have one."""
    return {group: option for group in CHOSEN if (option := config["choices"].get(group))}


def values_of_options(chosen: Mapping[str, str]) -> dict[str, object]:
    """Dotted path -> value of every key, of these options and the defaults alone."""
    return dict(flatten(compose(read_overrides([f"{group}={option}" for group, option in chosen.items()]), [], [])))


def words_of(config: Config) -> list[str]:
    """The overrides by which a config differs from the defaults: options of groups, then keys that differ from these options'."""
    chosen = {group: option for group, option in chosen_options(config).items() if option in options(group)}
    base, usual = values_of_options(chosen), load_config([])["choices"]
    shown = [f"{group}={option}" for group, option in chosen.items() if option != usual[group]]
    ours = values_of(config, *KINDS).items()
    return [*shown, *(f"{key}={_word(value)}" for key, value in ours if base.get(key, ...) != value)]


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
