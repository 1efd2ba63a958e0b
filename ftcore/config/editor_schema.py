"""ftcore/recipe.schema.json: a JSON schema with which editors complete and check recipe and sweep files.

A recipe holds differences, so no key is required. A group takes the keys of all its options; `check recipe=` knows the chosen
option and is stricter.
"""

import json
from collections.abc import Iterable

from ftcore.config.build import Schema, Schemas
from ftcore.config.options import options
from ftcore.config.roles import may_stand_in_files
from ftcore.config.yaml_source import Entry, read
from ftcore.files import PACKAGE, resources
from ftcore.settings import CHOSEN

CONF = resources() / "conf"
FILE = PACKAGE / "recipe.schema.json"


def build(schema: Schemas) -> str:
    """The content of recipe.schema.json from that of schema.json."""
    properties = _described(schema["top"]["properties"], read(CONF / "config.yaml").entries)
    properties |= {group: _group(schema, group) for group in CHOSEN}
    choice = {
        "type": "object",
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }  # override /method: dpo
    choice["properties"] = {f"override /{group}": {"enum": options(group)} for group in CHOSEN}
    recipe = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe or sweep of ftcore",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "defaults": {"type": "array", "items": {"anyOf": [{"const": "_self_"}, choice]}},
            **{key: value for key, value in properties.items() if may_stand_in_files(key)},
        },
    }
    recipe = json.loads(json.dumps(recipe), object_hook=_optional)
    return json.dumps(recipe, indent=1, sort_keys=True) + "\n"


def _group(schema: Schemas, group: str) -> Schema:
    """All keys of all options of a group."""
    types: dict[str, list[Schema]] = {}
    for target in schema["groups"][group]:
        for key, value in schema["targets"][target]["properties"].items():
            if value not in types.setdefault(key, []):
                types[key].append(value)
    properties = {key: values[0] if len(values) == 1 else Schema(anyOf=values) for key, values in types.items()}
    entries = [entry for file in sorted((CONF / group).glob("*.yaml")) for entry in read(file).entries]
    return {"type": "object", "properties": _described(properties, entries), "additionalProperties": False}


def _described(properties: dict[str, Schema], entries: Iterable[Entry]) -> dict[str, Schema]:
    """The schemas with comments of conf/ as descriptions, each from the first file that has the key."""
    comments = {entry.path: entry.comment.replace("\n", " ") for entry in reversed([*entries])}
    return {k: {**value, "description": comments[k]} if k in comments else value for k, value in properties.items()}


def _optional(node: dict[str, object]) -> dict[str, object]:
    """A part of the schema with nothing required, and without the role that ftcore reads."""
    left_out = {"required": list, "role": dict}
    return {key: value for key, value in node.items() if not isinstance(value, left_out.get(key, ()))}
