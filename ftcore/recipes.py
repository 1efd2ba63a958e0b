"""Recipes are data: a file of differences that a team shares, read as text, checked, and only then composed.

The accepted bytes are copied into a private folder, and that folder alone is on Hydra's search path: what was checked is
what is composed.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ftcore.errors import ConfigError
from ftcore.resources import resources

HEADER = "# @package _global_"
MAX_BYTES, MAX_DEPTH = 100_000, 20
OVERRIDE_GROUPS = ("model", "adapter", "data", "method", "hardware", "logger")


@dataclass
class Staged:
    """Where the accepted recipes lie, and the file and line of every key they set (dotted path -> `file:line`)."""

    search_path: list[Path] = field(default_factory=list)
    lines: dict[str, str] = field(default_factory=dict)


@contextmanager
def staged_recipes(names: list[tuple[str, str]], config_dirs: tuple[Path, ...] = ()) -> Iterator[Staged]:
    """Check the named files, (recipes or sweeps, name), and copy them into a private folder as long as the context lasts."""
    staged = Staged()
    if not names:
        yield staged
        return
    private = Path(tempfile.mkdtemp(prefix="ftcore-"))
    try:
        for group, name in names:
            _stage(group, name, config_dirs, private, staged)
        staged.search_path.append(private)
        yield staged
    finally:
        shutil.rmtree(private, ignore_errors=True)


def recipe_folders(config_dirs: tuple[Path, ...] = (), group: str = "recipes") -> list[Path]:
    """Folders searched for recipes (or sweeps): a team's own first, then the shipped ones."""
    team = [Path(entry) for entry in os.environ.get("FTCORE_RECIPES", "").split(os.pathsep) if entry]
    return [*team, *(folder / group for folder in config_dirs), resources() / group]


def _stage(group: str, name: str, config_dirs: tuple[Path, ...], private: Path, staged: Staged) -> None:
    file = next((f for d in recipe_folders(config_dirs, group) if (f := d / f"{name}.yaml").is_file()), None)
    if file is None or not re.fullmatch(r"\w[\w.-]*", name):
        places = ", ".join(map(str, recipe_folders(config_dirs, group)))
        raise ConfigError(f"There is no {name!r} among the {group} in {places}.")
    content = file.read_bytes()[: MAX_BYTES + 1]
    root = _parse(file, content)
    _check(file, root)
    for path, line in _key_lines(root):
        staged.lines[path] = f"{file}:{line}"
    (private / group).mkdir(exist_ok=True)
    (private / group / f"{name}.yaml").write_bytes(content)


def _parse(file: Path, content: bytes) -> yaml.MappingNode:
    """The recipe's node tree; events are counted before anything is built, so aliases and depth cannot explode."""
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{file} is larger than {MAX_BYTES:,} bytes, which no recipe needs.")
    if not content.startswith(HEADER.encode()):
        raise ConfigError(f"{file}:1: a recipe begins with the line '{HEADER}'.")
    try:
        depth = 0
        for event in yaml.parse(content, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH or getattr(event, "tag", None):
                raise ConfigError(
                    f"{file}:{event.start_mark.line + 1}: recipes have no aliases, no tags and few levels."
                )
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise ConfigError(f"{file}:{line}: not readable YAML: {getattr(error, 'problem', 'bad bytes')}.") from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{file}: a recipe is a mapping of keys to values.")
    return root


def _check(file: Path, root: yaml.MappingNode) -> None:
    """Refuse what could run code or reach outside the known groups."""
    for key, value in root.value:
        where = f"{file}:{key.start_mark.line + 1}"
        if key.value == "defaults":
            entries = yaml.safe_load(yaml.serialize(value))
            for entry in entries if isinstance(entries, list) else [entries]:
                _check_default(where, entry)
    for path, line in _key_lines(root):
        name = path.rsplit(".", 1)[-1]
        if path.split(".")[0] == "hydra" or re.fullmatch(r"_\w+_", name):
            raise ConfigError(f"{file}:{line}: {path!r} is not allowed; recipes are data and name no code.")
    for event in yaml.parse(yaml.serialize(root), Loader=yaml.SafeLoader):
        if isinstance(event, yaml.ScalarEvent) and re.search(r"\$\{[^}]*(:|\$\{)", event.value):
            raise ConfigError(f"{file}: a resolver ${{name:...}} is not allowed; recipes are data.")


def _check_default(where: str, entry: object) -> None:
    if entry == "_self_":
        return
    key, option = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else ("", "")
    match = re.fullmatch(r"override /(\w+)", str(key))
    if match is None or match[1] not in OVERRIDE_GROUPS or not re.fullmatch(r"[A-Za-z0-9]\w*", str(option)):
        raise ConfigError(
            f"{where}: a recipe's defaults are lines such as '- override /method: sft', for {', '.join(OVERRIDE_GROUPS)}."
        )


def _key_lines(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted path, line) of every key below `node`, deepest first within a branch."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {key.start_mark.line + 1} of the recipe: a key must be a plain word.")
            path = f"{prefix}.{key.value}".strip(".")
            yield from _key_lines(value, path)
            yield path, key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _key_lines(item, prefix)
