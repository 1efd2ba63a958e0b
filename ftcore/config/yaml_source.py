"""YAML files with what loading them loses: the line of every key and the comment above it.

Nothing here limits the size or depth of a file: recipe_rules does, before it reads a recipe.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import yaml

# libyaml, where installed, is ten times as fast.
LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Entry:
    """A key of a mapping: dotted path (without positions in lists), YAML nodes of key and value, and the comment above it."""

    path: str
    key: yaml.Node
    node: yaml.Node
    comment: str = ""
    in_list: bool = False  # its mapping is in a list
    repeated: bool = False  # a key of this name came before it in its mapping

    @property
    def line(self) -> int:
        """The line of the key, counted from 1."""
        return self.key.start_mark.line + 1

    @property
    def value(self) -> object:
        """The value, as `yaml.safe_load` would return it."""
        return yaml.constructor.SafeConstructor().construct_object(self.node, deep=True)


@dataclass(frozen=True)
class Source:
    """A YAML file: the comment it begins with, and its keys."""

    comment: str
    entries: list[Entry]

    def value(self, path: str) -> object:
        """The value at a dotted path; None where there is no such key."""
        return next((entry.value for entry in self.entries if entry.path == path), None)


def read(file: Path) -> Source:
    """Read a file. Raises the errors of PyYAML for one that is not YAML."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    root = yaml.compose(text, LOADER)
    if root:
        yaml.constructor.SafeConstructor().construct_object(
            root, deep=True
        )  # adds the keys that `<<` merges to the nodes
    return Source(_comment(lines, len([*takewhile(lambda line: line.startswith("#"), lines)])), [*entries(root, lines)])


def entries(
    node: yaml.Node | None, lines: Sequence[str] = (), above: str = "", in_list: bool = False
) -> Iterator[Entry]:
    """Every key below `node` in the order of the file, outer keys first; `lines` are the file's, for the comments.

    >>> text = "# What trains.\\nmodel:\\n  # Its folder.\\n  path: a/b"
    >>> [(key.line, key.path, key.comment) for key in entries(yaml.compose(text, LOADER), text.splitlines())]
    [(2, 'model', 'What trains.'), (4, 'model.path', 'Its folder.')]
    """
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from entries(item, lines, above, in_list=True)
    seen = set[str]()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        path = f"{above}.{name}".strip(".")
        yield Entry(path, key, value, _comment(lines, key.start_mark.line), in_list, name in seen)
        seen.add(name)
        yield from entries(value, lines, path, in_list)


def scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """Every key, value and list item below `node`."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    for item in node.value if isinstance(node, yaml.CollectionNode) else ():
        for part in item if isinstance(item, tuple) else (item,):
            yield from scalars(part)


def choices(keys: Iterable[Entry]) -> Iterator[tuple[str, str | None, int]]:
    """(group, option, line) of the items of a defaults list, such as `- method: sft` and `- override /method: dpo`."""
    for entry in keys:
        if entry.in_list and entry.path == f"defaults.{entry.key.value}":
            option = None if entry.node.tag == NULL else entry.node.value
            yield entry.key.value.removeprefix("override").strip(" /"), option, entry.line


def _comment(lines: Sequence[str], end: int) -> str:
    """The comment right above line number `end`, counted from 0."""
    comment = [*takewhile(lambda line: line.lstrip().startswith("#"), reversed(lines[:end]))][::-1]
    return "\n".join(line.strip().lstrip("# ") for line in comment if "@package" not in line)
