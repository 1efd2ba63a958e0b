"""Recipes are data: a file of differences that a team shares, read as text, checked, and only then composed.

The accepted bytes are copied into a private folder, and that folder alone is on Hydra's search path: what was checked is
what is composed.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from ftcore.config.options import recipe_folders
from ftcore.config.roles import not_for_files
from ftcore.config.yaml_source import Entry, choices, entries, scalars
from ftcore.errors import ConfigError
from ftcore.settings import CHOSEN, FILES

HEADER = "# @package _global_"
MAX_BYTES, MAX_DEPTH, MAX_DIGITS = 100_000, 20, 40
GIVEN = "given"
TEXT = "tag:yaml.org,2002:str"


@dataclass
class Staged:
    """Where the accepted recipes lie, and what they say: the file and line of every key they set (dotted path ->
    `file:line`), the options they choose (group -> option), and the keys that they leave to the command line (`???`).
    """

    search_path: list[Path] = field(default_factory=list)
    lines: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)


@contextmanager
def staged_recipes(names: Sequence[tuple[str, str | Path]], config_dirs: tuple[Path, ...] = ()) -> Iterator[Staged]:
    """Check the named files, (recipes or sweeps, name), and copy them into a private folder as long as the context lasts.

    A `Path` is a file that lies anywhere; it gets the name `GIVEN`.
    """
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


def _file_of(group: str, name: str, config_dirs: tuple[Path, ...]) -> Path:
    file = next((f for d in recipe_folders(config_dirs, group) if (f := d / f"{name}.yaml").is_file()), None)
    if file is None or not re.fullmatch(r"\w[\w.-]*", name):
        places = ", ".join(map(str, recipe_folders(config_dirs, group)))
        raise ConfigError(f"There is no {name!r} among the {group} in {places}.")
    return file


def _stage(group: str, name: str | Path, config_dirs: tuple[Path, ...], private: Path, staged: Staged) -> None:
    file, name = (name, GIVEN) if isinstance(name, Path) else (_file_of(group, name, config_dirs), name)
    if not file.is_file():
        raise ConfigError(f"There is no recipe file {file.absolute()}.")
    with file.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    root = _parse(file, content)
    keys = _inner_first(root)
    _check(file, root, keys)
    staged.lines |= {key.path: f"{file}:{key.line}" for key in keys}
    staged.chosen |= {group: str(option) for group, option, _ in choices(keys)}
    # Composing alone would keep the value that conf/ has for them.
    staged.required |= {key.path for key in keys if key.node.value == "???" and not key.in_list}
    (private / group).mkdir(exist_ok=True)
    (private / group / f"{name}.yaml").write_bytes(content)


def _parse(file: Path, content: bytes) -> yaml.MappingNode:
    """The recipe's node tree; events are counted before anything is built, so aliases and depth cannot explode."""
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{file} is larger than {MAX_BYTES:,} bytes, which no recipe needs.")
    lines = content.decode("utf-8", "replace").splitlines()  # as Hydra cuts them, which reads every such line
    if [line.rstrip() for line in lines if re.match(r"\s*#\s*@", line)] != [HEADER] or lines[0].rstrip() != HEADER:
        raise ConfigError(f"{file}:1: a recipe begins with the line '{HEADER}', and no other comment begins with @.")
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


def _check(file: Path, root: yaml.MappingNode, keys: list[Entry]) -> None:
    """Refuse what could run code or reach outside the known groups."""
    for key, value in root.value:
        if key.value == "defaults":
            for entry in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                _check_default(f"{file}:{entry.start_mark.line + 1}", entry)
        if key.value == "search":
            _check_search(file, value)
    _check_keys(file, keys)
    _check_scalars(file, root)


def _check_keys(file: Path, keys: list[Entry]) -> None:
    for key in keys:
        where, path = f"{file}:{key.line}", key.path
        if key.key.tag != TEXT or not key.key.value.isprintable() or key.repeated:  # `<<` has a tag of its own
            raise ConfigError(f"{where}: a key of a recipe is a plain word, and there once.")
        name = path.removeprefix("search.")  # what is searched is set
        if _only_said(name):
            searched = name != path
            why = "is not a key to be searched" if searched else "is not allowed; it is given on the command line only"
            raise ConfigError(f"{where}: {path} {why}.")
        if re.fullmatch(r"_\w+_", name.rsplit(".", 1)[-1].strip()):
            raise ConfigError(f"{where}: {path!r} is not allowed; recipes are data and name no code.")


def _inner_first(root: yaml.MappingNode) -> list[Entry]:
    """Every key, after those inside it: messages name the innermost key that is wrong."""
    return sorted(entries(root), key=lambda key: (key.node.end_mark.index, -key.key.start_mark.index))


def _only_said(text: str) -> bool:
    """Whether a key, or a word that begins with one, is said by a person only: what is done, where, and whose code runs."""
    return _keys_only_said().match(text) is not None


@cache
def _keys_only_said() -> re.Pattern[str]:
    return re.compile(rf"({'|'.join(map(re.escape, (*not_for_files(), *FILES, 'hydra')))})\b")


def _check_scalars(file: Path, root: yaml.Node) -> None:
    """Refuse text that something else would read as more than text, and numbers that take Python long."""
    for node in scalars(root):
        where = f"{file}:{node.start_mark.line + 1}"
        if "${" in node.value.replace("\\", ""):  # an override's `$\\{` is one too
            raise ConfigError(f"{where}: ${{...}} is not allowed; recipes are data and refer to nothing.")
        if "=" in node.value and _only_said(node.value.lstrip("+~ ")):  # a word for a stage
            raise ConfigError(f"{where}: {node.value.partition('=')[0]}= is for the command line only.")
        if node.tag != TEXT and len(node.value) > MAX_DIGITS:
            raise ConfigError(f"{where}: no number of a recipe has {len(node.value):,} characters.")


def _check_default(where: str, entry: yaml.Node) -> None:
    if isinstance(entry, yaml.ScalarNode) and entry.value == "_self_":
        return
    key, option = entry.value[0] if isinstance(entry, yaml.MappingNode) and len(entry.value) == 1 else (entry, entry)
    match = re.fullmatch(r"override /(\w+)", str(key.value))
    named = option.tag == TEXT and re.fullmatch(r"[A-Za-z0-9]\w*", str(option.value))
    if match is None or match[1] not in CHOSEN or not named:
        raise ConfigError(
            f"{where}: a recipe's defaults are lines such as '- override /method: sft', for {', '.join(CHOSEN)}."
        )


def _check_search(file: Path, search: yaml.Node) -> None:
    """Searched values become words of a command line: a key is a plain one, and no text is read as a mapping."""
    for key, _ in search.value if isinstance(search, yaml.MappingNode) else []:
        if not re.fullmatch(r"[A-Za-z]\w*(\.\w+)*", str(key.value)):
            raise ConfigError(
                f"{file}:{key.start_mark.line + 1}: search.{key.value} is not a key that can be searched."
            )
    for node in scalars(search):
        if "{" in node.value:
            raise ConfigError(
                f"{file}:{node.start_mark.line + 1}: a searched value is a number, a word or a list of them."
            )
