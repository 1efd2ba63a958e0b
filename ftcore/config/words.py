"""A config as the words of a command line."""

import json

from ftcore.config.compose import load_config
from ftcore.config.options import options
from ftcore.config.roles import values_of
from ftcore.config.tree import flatten
from ftcore.settings import CHOSEN, Config

KINDS = ("result", "rows", "scores", "machine")


def words_of(config: Config) -> list[str]:
    """The overrides by which a config differs from the defaults: options of groups, then keys that differ from these options'."""
    chosen = {group: name for group in CHOSEN if (name := config["choices"].get(group)) in options(group)}
    groups, usual = [f"{group}={name}" for group, name in chosen.items()], load_config([])["choices"]
    path = [f"data.path={config['data']['path']}"] if config["data"].get("path") else []
    base = dict(flatten(load_config([*groups, *path])))
    differing = {key: value for key, value in values_of(config, *KINDS).items() if base.get(key, ...) != value}
    shown = [f"{group}={name}" for group, name in chosen.items() if name != usual[group]]
    own = [word for word in path if "data.path" not in differing and f"data={chosen.get('data')}" in shown]
    return [*shown, *own, *(f"{key}={_word(value)}" for key, value in differing.items())]


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
