"""docs/reference.md: every option and every key, with its default, what it may be and what it means.

Meanings are the comments of conf/, recipes/ and sweeps/, types those of schema.json; `make schema` writes the page.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ftcore.config.build import Schema, Schemas
from ftcore.config.check import describe
from ftcore.config.roles import below
from ftcore.config.tree import above
from ftcore.config.yaml_source import Entry, Source, choices, read
from ftcore.files import PACKAGE, resources
from ftcore.settings import FILES, GROUPS

FILE = PACKAGE.parent / "docs" / "reference.md"
HEAD = """# Every option and every key

Written by `make schema` from the comments of `conf/` and the types in `ftcore/schema.json`: change those, not this page.

A run is one option of each group, and values for keys: `python -m ftcore method=dpo method.lr=1e-4 seed=2`. Options begin with
the shared keys of their group; each says here what it changes and adds. `python -m ftcore explain key=method.lr method=dpo` tells
what a run would get, and from which file."""
BAR = r"\|"  # one that ends no cell


@dataclass(frozen=True)
class Option:
    """A file of a group, and the files that its defaults name, whose keys it has too."""

    name: str
    source: Source
    bases: "list[Option]"

    @property
    def lineage(self) -> "Iterator[Option]":
        """The option and all that it stands on, nearest first."""
        yield self
        for base in self.bases:
            yield from base.lineage

    @property
    def target(self) -> str | None:
        """What is called with its keys; None for shared keys of several classes."""
        return next((str(found) for option in self.lineage if (found := option.source.value("_target_"))), None)

    def replaced(self, path: str) -> Entry | None:
        """The key that this option's own replaces."""
        known = (entry for base in self.bases for option in base.lineage for entry in option.source.entries)
        return next((entry for entry in known if entry.path == path), None)


def build(schema: Schemas) -> str:
    """The page, from the content of schema.json."""
    top = read(resources() / "conf" / "config.yaml")
    parts = [HEAD, "\n".join(_contents(top)), *_top_level(top, schema["top"])]
    for entry in top.entries:
        if entry.in_list:  # the lines of its defaults list
            parts += _group(entry, schema)
    return "\n\n".join(parts) + "\n"


def _contents(top: Source) -> Iterator[str]:
    yield "- [Top-level keys](#top-level-keys)"
    for group, *_ in choices(top.entries):
        yield f"- [{group}](#{group}): {', '.join(file.stem for file in _files(group) if file.stem[0] != '_')}"


def _files(group: str) -> list[Path]:
    return sorted((resources() / ("" if group in FILES else "conf") / group).glob("*.yaml"))


def _top_level(top: Source, schema: Schema) -> Iterator[str]:
    """A table of the keys with one value, then one for each mapping."""
    fields = [entry for entry in _fields(top) if entry.path.split(".")[0] not in GROUPS]
    mappings = [entry for entry in fields if _is_block(entry)]
    yield "## Top-level keys"
    yield _table(_row(entry, entry.path, schema) for entry in fields if "." not in entry.path and not _is_block(entry))
    for mapping in mappings:
        yield f"### {mapping.path}"
        yield _prose(mapping.comment)
        yield _table(_row(entry, entry.path, schema) for entry in fields if entry.path.startswith(f"{mapping.path}."))


def _group(chosen: Entry, schema: Schemas) -> Iterator[str]:
    """The sections of a group, from the line of config.yaml's defaults that chooses its option."""
    group, default = chosen.key.value, chosen.value
    yield f"## {group}"
    yield _prose(chosen.comment) + (f" Default: `{group}={default}`." if default else "")
    if group in FILES:
        yield "\n".join(line for file in _files(group) for line in (f"- `{group}={file.stem}`", *_purpose(read(file))))
        return
    options = _options(group)
    for option in options:
        users = (user.target for user in options if option.name in [o.name for o in user.lineage])
        target = next((found for found in users if found), "")
        yield f"### Shared keys: {option.name}" if option.name.startswith("_") else f"### {group}={option.name}"
        yield _prose(option.source.head)
        if record_type := schema["record_types"].get(option.target or ""):
            yield f"Learns from rows of the type `{record_type}`."
        yield from _keys(group, option, schema["targets"].get(target, {}))


def _purpose(source: Source) -> list[str]:
    """What a shared file is for, needs and gave, as its head says."""
    return [f"  - {_prose(part)}" for part in re.split(r"\n(?=Needs|Gave)", source.head)]


def _options(group: str) -> list[Option]:
    sources = {file.stem: read(file) for file in _files(group)}

    def option(name: str) -> Option:
        found = sources[name].value("defaults")
        named = found if isinstance(found, list) else []
        return Option(name, sources[name], [option(base) for base in named if base != "_self_"])

    return [option(name) for name in sources]


def _keys(group: str, option: Option, schema: Schema) -> Iterator[str]:
    """What an option changes of the keys that it stands on, and which it adds."""
    fields = [entry for entry in _fields(option.source) if entry.path != group]  # `logger: null` is no key of it
    changed = [entry for entry in fields if option.replaced(entry.path) and not _is_block(entry)]
    added = [entry for entry in fields if entry not in changed]
    if option.bases:
        bases = " and ".join(f"`{base.name}`" for base in option.bases)
        yield f"The keys of {bases}" + (", but" if changed else ", and:" if added else " as they are.")
    if changed:
        yield "\n".join(f"- `{group}.{entry.path}`: {_change(entry, option)}" for entry in changed)
    if added and changed:
        yield "It adds:"
    if added:
        yield _table(_row(entry, f"{group}.{entry.path}", schema) for entry in added)


def _change(entry: Entry, option: Option) -> str:
    before = option.replaced(entry.path)
    instead = f" instead of {_default(before)}" if before and before.value != "???" else ""
    return f"{_default(entry)}{instead}. {_prose(entry.comment)}"


def _fields(source: Source) -> Iterator[Entry]:
    """The keys of a file that have a line of their own; what brackets or braces hold is one value."""
    values = {"defaults", "_target_"}
    for entry in source.entries:
        if values.isdisjoint(above(entry.path)):
            yield entry
        if not _is_block(entry):
            values.add(entry.path)


def _is_block(entry: Entry) -> bool:
    return isinstance(entry.node, yaml.MappingNode) and not entry.node.flow_style


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    head = [("key", "default", "may be", "meaning"), ("---",) * 4]
    return "\n".join(f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in [*head, *rows])


def _row(entry: Entry, name: str, schema: Schema) -> tuple[str, str, str, str]:
    return f"`{name}`", _default(entry), _prose(_type(entry.path, schema)), _prose(entry.comment)


def _default(entry: Entry) -> str:
    """The value as the file has it."""
    if _is_block(entry):
        return "the keys below"
    text = yaml.serialize(entry.node, width=float("inf")).removesuffix("\n").removesuffix("\n...")
    return "to be given" if text == "???" else f"`{text}`"


def _type(path: str, schema: Schema) -> str:
    """Type and range of a key in words."""
    for key in path.split("."):
        schema = below(schema, key)
    return describe(schema) if schema else "anything"


def _prose(comment: str) -> str:
    """A comment as Markdown: one line, and outside of backticks nothing that Markdown would read as its own."""
    parts = " ".join(comment.split("\n")).split("`")
    return "`".join(re.sub(r"([<*])", r"\\\1", part) if k % 2 == 0 else part for k, part in enumerate(parts))
