"""YAML with what loading loses: the line of every key and the comment above it.

Nothing here limits what is read: recipe_rules counts the events of a stranger's file before it builds nodes of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml.constructor import SafeConstructor

# libyaml is ten times as fast where it is there.
LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Entry:
    """A key of a mapping: its dotted path, which leaves out places in lists, its nodes, and the comment right above it."""

    path: str
    key: yaml.Node
    node: yaml.Node
    comment: str = ""
    in_list: bool = False  # an item of a list is or holds its mapping
    repeated: bool = False  # its mapping has had a key of this name before

    @property
    def line(self) -> int:
        """Where the key stands, counted from 1."""
        return self.key.start_mark.line + 1

    @property
    def value(self) -> object:
        """What `yaml.safe_load` makes of it."""
        return SafeConstructor().construct_object(self.node, deep=True)


@dataclass(frozen=True)
class Source:
    """A file: the comment it begins with, and its keys."""

    head: str
    entries: list[Entry]

    def value(self, path: str) -> object:
        """The value at a dotted path; None where there is no such key."""
        return next((entry.value for entry in self.entries if entry.path == path), None)


def read(file: Path) -> Source:
    """A file's head and keys. Raises what YAML raises for a file that is none."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    end = next((k for k, line in enumerate(lines) if not line.startswith("#")), len(lines))
    root = yaml.compose(text, LOADER)
    if root:
        SafeConstructor().construct_object(root, deep=True)  # puts what `<<` merges into the nodes
    return Source(_comment(lines, end), list(entries(root, lines)))


def entries(
    node: yaml.Node | None, lines: Sequence[str] = (), above: str = "", in_list: bool = False
) -> Iterator[Entry]:
    """Every key below `node` in the order of the file, a key before those inside it; comments are taken from `lines`.

    >>> text = "# What trains.\\nmodel:\\n  # Where it lies.\\n  path: a/b"
    >>> [(key.line, key.path, key.comment) for key in entries(yaml.compose(text, LOADER), text.splitlines())]
    [(2, 'model', 'What trains.'), (4, 'model.path', 'Where it lies.')]
    """
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from entries(item, lines, above, in_list=True)
    known = set[str]()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        path = f"{above}.{name}".strip(".")
        yield Entry(path, key, value, _comment(lines, key.start_mark.line), in_list, name in known)
        known.add(name)
        yield from entries(value, lines, path, in_list)


def scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """Every key, value and list item below `node`."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    for item in node.value if isinstance(node, yaml.CollectionNode) else ():
        for part in item if isinstance(item, tuple) else (item,):
            yield from scalars(part)


def choices(found: Iterable[Entry]) -> Iterator[tuple[str, str | None, int]]:
    """(group, option, line) of a defaults list's lines such as `- method: sft` and `- override /method: dpo`."""
    for entry in found:
        if entry.in_list and entry.path == f"defaults.{entry.key.value}":
            option = None if entry.node.tag == NULL else entry.node.value
            yield entry.key.value.removeprefix("override").strip(" /"), option, entry.line


def _comment(lines: Sequence[str], end: int) -> str:
    """The comment lines right above line number `end`, counted from 0."""
    start = min(end, len(lines))
    while start and lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return "\n".join(line.strip().lstrip("# ") for line in lines[start:end] if "@package" not in line)
