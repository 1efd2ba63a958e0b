"""docs/reference.md: every option and every key, with its default, its type and its meaning.

Meanings are the comments of conf/, recipes/ and sweeps/, types those of schema.json; `make schema` writes the page.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from ftcore.config.build import Schema, Schemas
from ftcore.config.check import describe
from ftcore.config.options import folders
from ftcore.config.roles import below
from ftcore.config.tree import above
from ftcore.config.yaml_source import Entry, Source, read
from ftcore.files import PACKAGE, resources
from ftcore.settings import FILES

FILE = PACKAGE.parent / "docs" / "reference.md"
INTRODUCTION = """# Every option and every key

Written by `make schema` from the comments of `conf/` and the types in `ftcore/schema.json`: change those, not this page.

A run is one option of each group, and values for keys: `python -m ftcore method=dpo method.lr=1e-4 seed=2`. An option lists the
keys that it adds or changes; it has the other keys of the option or shared keys that it is based on. To see what a run would get,
and from which file, use `python -m ftcore explain key=method.lr method=dpo`."""
BAR = r"\|"  # one that ends no cell
COLUMNS = ["| key | default | type | meaning |", "| --- | --- | --- | --- |"]


def build(schema: Schemas) -> str:
    """The page, from the content of schema.json."""
    top = read(resources() / "conf" / "config.yaml")
    groups = [entry for entry in top.entries if entry.in_list]  # the lines of its defaults list
    contents = ["- [Top-level keys](#top-level-keys)", *(_contents(entry.key.value) for entry in groups)]
    parts = [INTRODUCTION, "\n".join(contents), "## Top-level keys", _table(top, "", schema["top"])]
    for entry in groups:
        parts += _group(entry, schema)
    return "\n\n".join(part for part in parts if part) + "\n"


def _contents(group: str) -> str:
    return f"- [{group}](#{group}): {', '.join(file.stem for file in _files(group) if file.stem[0] != '_')}"


def _files(group: str) -> list[Path]:
    return sorted(folders(group)[-1].glob("*.yaml"))


def _group(chosen: Entry, schema: Schemas) -> Iterator[str]:
    """The sections of a group, from the line of config.yaml's defaults list that chooses its option."""
    group, default = chosen.key.value, chosen.value
    yield f"## {group}"
    yield _prose(chosen.comment) + (f" Default: `{group}={default}`." if default else "")
    for file in _files(group):
        source = read(file)
        target, bases = source.value("_target_"), source.value("defaults")
        yield f"### Shared keys: {file.stem}" if file.stem[0] == "_" else f"### {group}={file.stem}"
        yield _prose(source.comment)
        if group in FILES:
            continue
        if target in schema["record_types"]:
            yield f"Learns from rows of the type `{schema['record_types'][str(target)]}`."
        if isinstance(bases, list):
            yield f"Based on {' and '.join(f'`{base}`' for base in bases if base != '_self_')}."
        yield _table(source, group, _schema_of(source, group, schema))


def _schema_of(source: Source, group: str, schema: Schemas) -> Schema:
    """The schema of the file's target or, where the file names none, of the group's first target that has all its keys."""
    keys = {entry.path.split(".")[0] for entry in source.entries} - {"defaults", "_target_"}
    targets = [source.value("_target_"), *schema["groups"][group]]
    schemas = (schema["targets"].get(str(target), Schema(properties={})) for target in targets)
    return next((found for found in schemas if keys <= found["properties"].keys()), Schema())


def _table(source: Source, group: str, schema: Schema) -> str:
    """A row for each key that has a line of its own; what brackets or braces hold is one value. "" for a file without keys."""
    rows, skipped = [], {"defaults", "_target_", group}  # `logger: null` is no key of logger=none
    for entry in source.entries:
        is_block = isinstance(entry.node, yaml.MappingNode) and not entry.node.flow_style
        if skipped.isdisjoint(above(entry.path)):
            key, default = f"{group}.{entry.path}".strip("."), "the keys below" if is_block else _written(entry.node)
            cells = [f"`{key}`", default, _type(entry.path, schema), _prose(entry.comment)]
            rows.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
        if not is_block:
            skipped.add(entry.path)
    return "\n".join([*COLUMNS, *rows]) if rows else ""


def _written(node: yaml.Node) -> str:
    """A value as the file has it."""
    text = yaml.serialize(node, width=float("inf")).removesuffix("\n").removesuffix("\n...")
    return "required" if text == "???" else f"`{text}`"


def _type(path: str, schema: Schema) -> str:
    """Type and range of a key in words."""
    for key in path.split("."):
        schema = below(schema, key)
    return _prose(describe(schema)) if schema else "anything"


def _prose(comment: str) -> str:
    """A comment as Markdown: one line, in which `<` and `*` outside of backticks are escaped."""
    parts = comment.replace("\n", " ").split("`")
    return "`".join(re.sub(r"([<*])", r"\\\1", part) if k % 2 == 0 else part for k, part in enumerate(parts))
