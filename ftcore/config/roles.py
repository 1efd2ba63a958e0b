"""What each key of a config is for, as its declaration says (settings.Role), carried by ftcore/schema.json."""

from collections.abc import Iterator, Mapping
from functools import cache

from ftcore.config.build import Schema, schema_of_target, schemas
from ftcore.config.tree import above, leaves
from ftcore.config.trust import trusted
from ftcore.settings import RULES, Role


def top_roles() -> dict[str, Role]:
    """Top-level key -> what it is for."""
    return {key: _inherited(schema, Role()) for key, schema in schemas()["top"]["properties"].items()}


def keys_of(*kinds: str) -> list[str]:
    """The top-level keys of these kinds."""
    return [key for key, role in top_roles().items() if role.kind in kinds]


def mappings() -> set[str]:
    """The top-level keys whose value is a mapping."""
    top = schemas()["top"]
    kinds = {key: branches(schema, top["$defs"]) for key, schema in top["properties"].items()}
    return {key for key, found in kinds.items() if any(branch.get("type") == "object" for branch in found)}


def leaves_of(config: Mapping[str, object], *kinds: str) -> dict[str, object]:
    """Dotted path -> value of everything in a config that is of these kinds."""
    return {path: value for path, value in leaves(config) if role_of(path, config).kind in kinds}


def files_of_config(config: Mapping[str, object], *kinds: str) -> Iterator[tuple[str, str]]:
    """(dotted path, value) of every key that names a file or folder of these kinds, by default of all, and has a value."""
    for path, value in leaves(config):
        kind = role_of(path, config).path
        if kind and isinstance(value, str) and (not kinds or kind in kinds):
            yield path, value


def role_of(path: str, config: Mapping[str, object]) -> Role:
    """What the key `path` (dotted) of this config is for."""
    role = Role()
    for schema in _schemas_along(path, config):
        role = _inherited(schema, role)
    return role


def type_of(path: str, config: Mapping[str, object]) -> Schema:
    """The schema of the key `path` of this config, references looked up; {} where anything may stand."""
    *_, last = _schemas_along(path, config)
    return last


def _schemas_along(path: str, config: Mapping[str, object]) -> Iterator[Schema]:
    """The schemas of a top-level key and of each key below it on the way to `path`."""
    top, *rest = path.split(".")
    trust = config.get("trust", trusted())
    node, definitions = config.get(top), schemas()["top"].get("$defs", {})
    schema = schemas()["top"]["properties"].get(top, {})
    yield _looked_up(schema, definitions)
    if isinstance(node, Mapping) and "_target_" in node and rest:
        schema = schema_of_target(str(node["_target_"]), trust if isinstance(trust, list) else [])
        definitions = schema.get("$defs", {})
    for part in rest:
        schema = below(schema, part, definitions)
        yield _looked_up(schema, definitions)


def _looked_up(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    found: Schema = {"anyOf": branches(schema, definitions)} if schema.keys() & {"$ref", "anyOf"} else {**schema}
    if "role" in schema:
        found["role"] = schema["role"]
    return found


@cache
def not_for_files() -> frozenset[str]:
    """Dotted paths, below any option of a group, that only the command line may set."""
    found = {key for key, role in top_roles().items() if role.recipe is False}
    for group, targets in schemas()["groups"].items():
        for target in targets:
            schema = schemas()["targets"][target]
            found |= set(_refused(schema, group, top_roles()[group], schema.get("$defs", {})))
    return frozenset(found)


def may_stand_in_files(path: str) -> bool:
    """Whether a recipe or a sweep may set the key `path`."""
    return not_for_files().isdisjoint(above(path))


def _refused(schema: Schema, path: str, role: Role, definitions: Mapping[str, Schema]) -> Iterator[str]:
    for branch in branches(schema, definitions):
        for key, inner in branch.get("properties", {}).items():
            own = _inherited(inner, role)
            if own.recipe is False:
                yield f"{path}.{key}"
            else:
                yield from _refused(inner, f"{path}.{key}", own, definitions)


def _inherited(schema: Schema, outer: Role) -> Role:
    """The role that a key's schema declares, what it leaves out taken from its kind or else from the mapping around it."""
    own = Role(**schema.get("role", {}))  # type: ignore[arg-type]
    resume, recipe = RULES[own.kind] if own.kind else (outer.resume, outer.recipe)
    return Role(
        own.kind or outer.kind,
        own.path,
        resume if own.resume is None else own.resume,
        recipe if own.recipe is None else own.recipe,
        own.stage or outer.stage,
    )


def branches(schema: Schema, definitions: Mapping[str, Schema]) -> list[Schema]:
    """The alternatives of a schema, references looked up."""
    if "$ref" in schema:
        return branches(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return [found for branch in schema["anyOf"] for found in branches(branch, definitions)]
    return [schema]


def below(schema: Schema, key: str, definitions: Mapping[str, Schema]) -> Schema:
    """The schema of one key of a mapping; {} where it is free."""
    for branch in branches(schema, definitions):
        if key in branch.get("properties", {}):
            return branch["properties"][key]
        inner = branch.get("additionalProperties")
        if inner:
            return inner if isinstance(inner, dict) else {}
    return {}
