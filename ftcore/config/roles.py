"""What each key of a config is for: the `settings.Role` of its declaration, read from ftcore/schema.json."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

from ftcore.config.build import Schema, schema_of_target, schemas
from ftcore.config.tree import above, flatten
from ftcore.config.trust import trusted
from ftcore.settings import RULES, Role


def top_roles() -> dict[str, Role]:
    """Top-level key -> its role."""
    return {key: _inherited(schema, Role()) for key, schema in schemas()["top"]["properties"].items()}


def keys_of(*kinds: str) -> list[str]:
    """The top-level keys of these kinds."""
    return [key for key, role in top_roles().items() if role.kind in kinds]


def mappings() -> set[str]:
    """The top-level keys whose value is a mapping."""
    properties = schemas()["top"]["properties"].items()
    return {key for key, schema in properties if any(branch.get("type") == "object" for branch in branches(schema))}


def values_of(config: Mapping[str, object], *kinds: str) -> dict[str, object]:
    """Dotted path -> value of every key in a config that is of these kinds."""
    return {path: value for path, value in flatten(config) if role_of(path, config).kind in kinds}


def files_of_config(config: Mapping[str, object], *kinds: str) -> Iterator[tuple[str, str]]:
    """(dotted path, value) of every key that names a file or folder of these kinds (none given: of any) and is not null."""
    for path, value in flatten(config):
        kind = role_of(path, config).path
        if kind and isinstance(value, str) and (not kinds or kind in kinds):
            yield path, value


def role_of(path: str, config: Mapping[str, object]) -> Role:
    """The role of the key at a dotted path of this config."""
    return _look_up(path, config)[0]


def type_of(path: str, config: Mapping[str, object]) -> Schema:
    """The schema of the key at a dotted path of this config; {} where any value is allowed."""
    return _look_up(path, config)[1]


def is_text(path: str) -> bool:
    """Whether a dotted key, of any option of its group, takes nothing but text (or null): a path, a name, a column."""
    top, *rest = path.split(".")
    known = schemas()
    roots = [
        known["top"]["properties"].get(top, {}),
        *(known["targets"][name] for name in known["groups"].get(top, ())),
    ]
    found = [branches(_walk(root, Role(), rest)[1]) for root in roots]
    kinds = [{"choice" if "enum" in branch else branch.get("type") for branch in several} for several in found]
    return any("string" in types and types <= {"string", "null"} for types in kinds)


def _look_up(path: str, config: Mapping[str, object]) -> tuple[Role, Schema]:
    top, *rest = path.split(".")
    node, schema = config.get(top), schemas()["top"]["properties"].get(top, {})
    role = _inherited(schema, Role())
    if isinstance(node, Mapping) and "_target_" in node:
        trust = config.get("trust", trusted())
        schema = schema_of_target(str(node["_target_"]), trust if isinstance(trust, list) else [])
    return _walk(schema, role, rest)


def _walk(schema: Schema, role: Role, keys: list[str]) -> tuple[Role, Schema]:
    """Role and schema of what lies below a mapping by these keys."""
    for key in keys:
        schema = below(schema, key)
        role = _inherited(schema, role)
    return role, schema


@cache
def not_for_files() -> frozenset[str]:
    """Dotted paths, of any option of a group, that no recipe or sweep may set: only the command line may."""
    roots = [(key, schema, Role()) for key, schema in schemas()["top"]["properties"].items()]
    for group, targets in schemas()["groups"].items():
        roots += [(group, schemas()["targets"][target], top_roles()[group]) for target in targets]
    return frozenset(path for root in roots for path in _not_for_files(*root))


def may_stand_in_files(path: str) -> bool:
    """Whether a recipe or a sweep may set the key at a dotted path."""
    return not_for_files().isdisjoint(above(path))


def _not_for_files(path: str, schema: Schema, outer: Role) -> Iterator[str]:
    role = _inherited(schema, outer)
    if role.recipe is False:
        yield path
        return
    for branch in branches(schema):
        for key, inner in branch.get("properties", {}).items():
            yield from _not_for_files(f"{path}.{key}", inner, role)


def _inherited(schema: Schema, outer: Role) -> Role:
    """The role of a key: what its own schema says, else the rules of its kind, else the role of the mapping around it."""
    own = schema.get("role", {})
    rules = RULES[own["kind"]] if "kind" in own else {}  # type: ignore[index]
    return replace(outer, **{"path": None, **rules, **own})  # type: ignore[arg-type]


def branches(schema: Schema) -> list[Schema]:
    """The alternatives of a schema (`anyOf`), or the schema itself."""
    return [found for branch in schema["anyOf"] for found in branches(branch)] if "anyOf" in schema else [schema]


def below(schema: Schema, key: str) -> Schema:
    """The schema of one key of a mapping; {} where any value is allowed."""
    for branch in branches(schema):
        if key in branch.get("properties", {}):
            return branch["properties"][key]
        if inner := branch.get("additionalProperties"):
            return inner if isinstance(inner, dict) else {}
    return {}
