"""A JSON schema of recipe and sweep files, with which editors complete and check them: ftcore/recipe.schema.json.

A recipe holds differences, so nothing is required, and a group takes the keys of all its options; `check recipe=` knows which
options are chosen and is stricter.
"""

import json

from ftcore.config.build import Schema, Schemas
from ftcore.config.roles import may_stand_in_files
from ftcore.config.yaml_source import Entry, read
from ftcore.files import PACKAGE, resources
from ftcore.settings import CHOSEN

CONF = resources() / "conf"
FILE = PACKAGE / "recipe.schema.json"


def build(schema: Schemas) -> str:
    """The content of recipe.schema.json from that of schema.json."""
    properties = _described(schema["top"]["properties"], _comments(read(CONF / "config.yaml").entries))
    for group in CHOSEN:
        properties[group] = _group(schema, group)
    properties = {key: value for key, value in properties.items() if may_stand_in_files(key)}
    defaults = {"type": "array", "items": {"anyOf": [{"const": "_self_"}, _choice()]}}
    recipe = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe or sweep of ftcore",
        "type": "object",
        "additionalProperties": False,
        "properties": {"defaults": defaults, **properties},
    }
    return json.dumps(_optional(recipe), indent=1, sort_keys=True) + "\n"


def _group(schema: Schemas, group: str) -> Schema:
    """All keys of all options of a group."""
    entries = [entry for file in sorted((CONF / group).glob("*.yaml")) for entry in read(file).entries]
    targets = {str(entry.value) for entry in entries if entry.path == "_target_"}
    found: dict[str, list[Schema]] = {}
    for target in sorted(targets & schema["targets"].keys()):
        for key, value in schema["targets"][target]["properties"].items():
            if value not in found.setdefault(key, []):
                found[key].append(value)
    properties = {key: values[0] if len(values) == 1 else Schema(anyOf=values) for key, values in found.items()}
    return {"type": "object", "properties": _described(properties, _comments(entries)), "additionalProperties": False}


def _described(properties: dict[str, Schema], comments: dict[str, str]) -> dict[str, Schema]:
    return {k: {**value, "description": comments[k]} if k in comments else value for k, value in properties.items()}


def _comments(entries: list[Entry]) -> dict[str, str]:
    """Key of conf/ -> the comment above it, in the first file that has the key."""
    return {entry.path: entry.comment.replace("\n", " ") for entry in reversed(entries)}


def _choice() -> dict[str, object]:
    """A line of defaults: `override /method: dpo`."""
    names = {
        f"override /{group}": {"enum": [f.stem for f in sorted((CONF / group).glob("[!_]*.yaml"))]} for group in CHOSEN
    }
    return {
        "type": "object",
        "properties": names,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }


def _optional(node: object) -> object:
    """The same schema with nothing required, and without the roles that ftcore reads."""
    if isinstance(node, dict):
        ours = {"required": list, "role": dict}
        return {k: _optional(v) for k, v in node.items() if not isinstance(v, ours.get(k, ()))}
    return [_optional(item) for item in node] if isinstance(node, list) else node
