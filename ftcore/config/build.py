"""From a checked node to what its `_target_` names, and the schemas of what it may hold."""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pkgutil import resolve_name
from typing import TypedDict, TypeVar, cast

from ftcore.config.trust import is_trusted
from ftcore.errors import ConfigError
from ftcore.files import PACKAGE

T = TypeVar("T")


class Schema(TypedDict, total=False):
    """JSON schema (2020-12) of one value, as far as it is read here; `role` holds what a `settings.Role` says."""

    type: str
    anyOf: list["Schema"]
    enum: list[object]
    const: object
    properties: dict[str, "Schema"]
    additionalProperties: "bool | Schema"
    description: str
    role: dict[str, object]


class Schemas(TypedDict):
    """ftcore/schema.json: the top-level keys, what each target takes, and the targets of each group."""

    top: Schema
    targets: dict[str, Schema]
    groups: dict[str, list[str]]
    record_types: dict[str, str]
    trainer_keys: list[str]
    trainer_owned: list[str]


@cache
def schemas() -> Schemas:
    """What every key of the config may be."""
    return json.loads((PACKAGE / "schema.json").read_text())


def schema_of_target(target: str, trust: Iterable[str]) -> Schema:
    """The schema of a node of this target: a shipped one, or a trusted module's, from its signature; {} for any other.

    Raises `ConfigError` when a module of the user's own cannot be imported.
    """
    if target in schemas()["targets"] or not is_trusted(target, trust):  # what is not trusted is not even imported
        return schemas()["targets"].get(target, {})
    from ftcore.config.schema import schema_of

    try:
        return cast(Schema, schema_of(resolve_name(target)))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"_target_ {target} cannot be imported: {type(error).__name__}: {error}.") from None


def locate(node: Mapping[str, object], kind: type[T]) -> type[T]:
    """The class that a checked node's `_target_` names, a `kind`."""
    return resolve_name(str(node["_target_"]))


def build(node: Mapping[str, object], kind: type[T], *given: object) -> T:
    """Call a checked node's target with the program's own arguments first and the node's keys after; it gives a `kind`."""
    target = resolve_name(str(node["_target_"]))
    made = target(*given, **{key: value for key, value in node.items() if key != "_target_"})
    assert isinstance(made, kind), f"{node['_target_']} gives {type(made).__name__}"
    return made


def record_type(method: Mapping[str, object]) -> str:
    """The record type that a method needs, without importing it unless it is a user's own."""
    target = str(method["_target_"])
    return schemas()["record_types"].get(target) or resolve_name(target).record_type
