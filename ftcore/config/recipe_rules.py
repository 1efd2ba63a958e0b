"""Recipes and sweeps are data: files that people share, which are read as text and checked before Hydra composes them.

The checked bytes are copied into a private folder, and only that folder is on Hydra's search path: what was checked is what
is composed.
"""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from ftcore.config.options import folders
from ftcore.config.roles import not_for_files
from ftcore.config.yaml_source import Entry, choices, entries, scalars
from ftcore.errors import ConfigError
from ftcore.settings import CHOSEN, FILES

HEADER = "# @package _global_"
MAX_BYTES, MAX_DEPTH, MAX_NODES, MAX_DIGITS, MAX_KEY = 100_000, 20, 5_000, 40, 200
GIVEN = "given"
TEXT = "tag:yaml.org,2002:str"
Problems = Iterator[tuple[yaml.Node, str]]  # what the file is refused for, and why


@dataclass
class Staged:
    """The checked recipes: the folder of their copies, the place of every key (dotted path -> `file:line`), the options they
    choose (group -> option), and the keys that they leave to the command line (`???`).
    """

    search_path: list[Path] = field(default_factory=list)
    lines: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)


@contextmanager
def staged_recipes(names: Sequence[tuple[str, str | Path]], config_dirs: tuple[Path, ...] = ()) -> Iterator[Staged]:
    """Check files, given as (recipes or sweeps, name), and copy them into a private folder, which the context removes.

    A `Path` instead of a name is a file at any path; its copy is called `GIVEN`. Raises `ConfigError` for a refused file.
    """
    staged = Staged()
    if not names:
        yield staged
        return
    with tempfile.TemporaryDirectory(prefix="ftcore-", ignore_cleanup_errors=True) as private:
        for group, name in names:
            _stage(group, name, config_dirs, Path(private), staged)
        staged.search_path.append(Path(private))
        yield staged


def _stage(group: str, name: str | Path, config_dirs: tuple[Path, ...], private: Path, staged: Staged) -> None:
    file, name = (name, GIVEN) if isinstance(name, Path) else (_file_of(group, name, config_dirs), name)
    if not file.is_file():
        raise ConfigError(f"There is no recipe file {file.absolute()}.")
    with file.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    root = _parse(file, content)
    keys = list(entries(root))
    for node, problem in _problems(root, keys):
        raise ConfigError(f"{file}:{node.start_mark.line + 1}: {problem}")
    staged.lines |= {key.path: f"{file}:{key.line}" for key in keys}
    staged.chosen |= {group: str(option) for group, option, _ in choices(keys)}
    # Composing would keep conf/'s value for them.
    staged.required |= {key.path for key in keys if key.node.value == "???" and not key.in_list}
    (private / group).mkdir(exist_ok=True)
    (private / group / f"{name}.yaml").write_bytes(content)


def _file_of(group: str, name: str, config_dirs: tuple[Path, ...]) -> Path:
    searched = folders(group, config_dirs)
    file = next((f for folder in searched if (f := folder / f"{name}.yaml").is_file()), None)
    if file is None or not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"There is no {name!r} among the {group} in {', '.join(map(str, searched))}.")
    return file


def _parse(file: Path, content: bytes) -> yaml.MappingNode:
    """The recipe's node tree; events are checked before anything is built, so aliases and depth cannot explode."""
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{file} is larger than {MAX_BYTES:,} bytes, which no recipe needs.")
    lines = content.decode("utf-8", "replace").splitlines()  # split as Hydra splits them, which reads every header
    if [line.rstrip() for line in lines if re.match(r"\s*#\s*@", line)] != [HEADER] or lines[0].rstrip() != HEADER:
        raise ConfigError(f"{file}:1: a recipe begins with the line '{HEADER}', and no other comment begins with @.")
    try:
        depth = 0
        for number, event in enumerate(yaml.parse(content, Loader=yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            is_large = depth > MAX_DEPTH or number > MAX_NODES
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) or is_large:
                limits = f"at most {MAX_DEPTH} levels and {MAX_NODES:,} keys and values"
                raise ConfigError(f"{file}:{event.start_mark.line + 1}: a recipe has no aliases, no tags, {limits}.")
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise ConfigError(f"{file}:{line}: not readable YAML: {getattr(error, 'problem', 'bad bytes')}.") from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{file}: a recipe is a mapping of keys to values.")
    return root


def _problems(root: yaml.MappingNode, keys: list[Entry]) -> Problems:
    """What could run code or reach outside the known groups."""
    for key, value in root.value:
        if key.value == "defaults":
            yield from _wrong_choices(value)
        for node in scalars(value) if key.value == "search" else ():
            if "{" in node.value:
                yield node, "a searched value is a number, a word or a list of them."
    yield from _wrong_keys(keys)
    yield from _wrong_values(root)


def _wrong_choices(defaults: yaml.Node) -> Problems:
    for line in defaults.value if isinstance(defaults, yaml.SequenceNode) else [defaults]:
        key, option = line.value[0] if isinstance(line, yaml.MappingNode) and len(line.value) == 1 else (line, line)
        group = re.fullmatch(r"override /(\w+)", str(key.value))
        is_option = option.tag == TEXT and re.fullmatch(r"[A-Za-z0-9]\w*", str(option.value))
        if line.value != "_self_" and not (group and group[1] in CHOSEN and is_option):
            groups = ", ".join(CHOSEN)
            yield line, f"a recipe's defaults are lines such as '- override /method: sft', for {groups}."


def _wrong_keys(keys: list[Entry]) -> Problems:
    for entry in keys:
        word, key = (
            entry.key.value,
            entry.path.removeprefix("search."),
        )  # searching a key sets it, by a word `key=value`
        searched = key != entry.path
        if entry.key.tag != TEXT or not word.isprintable() or entry.repeated:  # `<<` has a tag of its own
            yield entry.key, "a key of a recipe is plain text and stands there once."
        elif len(word) > MAX_KEY:
            yield entry.key, f"no key of a recipe has {len(word):,} characters."
        elif _command_line_only().match(key) or (searched and not re.fullmatch(r"[A-Za-z]\w*(\.\w+)*", word)):
            why = "is not a key that can be searched" if searched else "may be set on the command line only"
            yield entry.key, f"{entry.path} {why}."
        elif re.fullmatch(r"_\w+_", key.rsplit(".", 1)[-1].strip()):
            yield entry.key, f"{entry.path!r} is not allowed; recipes are data and name no code."


@cache
def _command_line_only() -> re.Pattern[str]:
    """Matches keys that only a person may set, and words that begin with one: what is done, where, and whose code runs."""
    return re.compile(rf"({'|'.join(map(re.escape, (*not_for_files(), *FILES, 'hydra')))})\b")


def _wrong_values(root: yaml.Node) -> Problems:
    """Text that would be read as more than text, and numbers that take Python long to read."""
    for node in scalars(root):
        if "${" in node.value.replace("\\", ""):  # in an override `$\\{` is one too
            yield node, "${...} is not allowed; recipes are data and refer to nothing."
        if "=" in node.value and _command_line_only().match(node.value.lstrip("+~ ")):  # an override for a stage
            yield node, f"{node.value.partition('=')[0]}= is for the command line only."
        if node.tag != TEXT and len(node.value) > MAX_DIGITS:
            yield node, f"no number of a recipe has {len(node.value):,} characters."
