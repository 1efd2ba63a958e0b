"""A JSON schema of recipe and sweep files, with which editors complete and check them: ftcore/recipe.schema.json.

A recipe holds differences, so nothing is required, and a group takes the keys of all its options; `check recipe=` knows which
options are chosen and is stricter.
"""

import json
from typing import Any

from ftcore.config.recipe_rules import OVERRIDE_GROUPS
from ftcore.config.yaml_source import Entry, read
from ftcore.files import PACKAGE, resources

Schema = dict[str, Any]


CONF = resources() / "conf"


FILE = PACKAGE / "recipe.schema.json"


# Keys that no file may set.
OF_THE_COMMAND_LINE = ("trust", "choices", "verb", "run", "other", "prompt", "resume", "output_dir")


def build(schema: Schema) -> str:
    """The content of recipe.schema.json from that of schema.json."""
    properties = _described(schema["top"]["properties"], _comments(read(CONF / "config.yaml").entries))
    for group in OVERRIDE_GROUPS:
        properties[group] = _group(schema, group)
    for key in OF_THE_COMMAND_LINE:
        properties.pop(key)
    defaults = {"type": "array", "items": {"anyOf": [{"const": "_self_"}, _choice()]}}
    definitions: Schema = {}
    for part in (schema["top"], *schema["targets"].values()):
        definitions |= part.get("$defs", {})
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe or sweep of ftcore",
        "type": "object",
        "additionalProperties": False,
        "properties": {"defaults": defaults, **properties},
        "$defs": definitions,
    }
    return json.dumps(_optional(whole), indent=1, sort_keys=True) + "\n"


def _group(schema: Schema, group: str) -> Schema:
    """All keys of all options of a group."""
    entries = [entry for file in sorted((CONF / group).glob("*.yaml")) for entry in read(file).entries]
    targets = {entry.value for entry in entries if entry.path == "_target_"}
    found: dict[str, list[Schema]] = {}
    for target in sorted(targets & schema["targets"].keys()):
        for key, value in schema["targets"][target]["properties"].items():
            if value not in found.setdefault(key, []):
                found[key].append(value)
    properties = {key: values[0] if len(values) == 1 else {"anyOf": values} for key, values in found.items()}
    return {"type": "object", "properties": _described(properties, _comments(entries)), "additionalProperties": False}


def _described(properties: Schema, comments: dict[str, str]) -> Schema:
    return {k: {**value, "description": comments[k]} if k in comments else value for k, value in properties.items()}


def _comments(entries: list[Entry]) -> dict[str, str]:
    """Key of conf/ -> the comment above it, in the first file that has the key."""
    return {entry.path: entry.comment.replace("\n", " ") for entry in reversed(entries)}


def _choice() -> Schema:
    """A line of defaults: `override /method: dpo`."""
    names = {
        f"override /{group}": {"enum": [f.stem for f in sorted((CONF / group).glob("[!_]*.yaml"))]}
        for group in OVERRIDE_GROUPS
    }
    return {
        "type": "object",
        "properties": names,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }


def _optional(node: Any) -> Any:
    """The same schema with nothing required."""
    if isinstance(node, dict):
        return {k: _optional(v) for k, v in node.items() if not (k == "required" and isinstance(v, list))}
    return [_optional(item) for item in node] if isinstance(node, list) else node
