"""Build the object that a checked node's `_target_` names, and find the schema that the node was checked against."""

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
    """ftcore/schema.json: schemas of the top-level keys and of every shipped target, and the targets of each group."""

    top: Schema
    targets: dict[str, Schema]
    groups: dict[str, list[str]]
    record_types: dict[str, str]
    trainer_keys: list[str]
    trainer_owned: list[str]


@cache
def schemas() -> Schemas:
    """The content of ftcore/schema.json."""
    return json.loads((PACKAGE / "schema.json").read_text())


def schema_of_target(target: str, trust: Iterable[str]) -> Schema:
    """The schema of a node with this `_target_`; of a trusted module's from its signature, {} where nobody vouches for it.

    Raises `ConfigError` when a trusted module cannot be imported.
    """
    if target in schemas()["targets"] or not is_trusted(target, trust):  # import nothing that is not trusted
        return schemas()["targets"].get(target, {})
    from ftcore.config.schema import schema_of

    try:
        return cast(Schema, schema_of(resolve_name(target)))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"_target_ {target} cannot be imported: {type(error).__name__}: {error}.") from None


def locate(node: Mapping[str, object], kind: type[T]) -> type[T]:
    """The class, a `kind`, that a checked node's `_target_` names."""
    return resolve_name(str(node["_target_"]))


def build(node: Mapping[str, object], kind: type[T], *arguments: object) -> T:
    """Call a checked node's target with `arguments`, then the node's keys as keyword arguments. It returns a `kind`."""
    target = resolve_name(str(node["_target_"]))
    given = {**_lacking(node), **{key: value for key, value in node.items() if key != "_target_"}}
    built = target(*arguments, **given)
    assert isinstance(built, kind), f"{node['_target_']} returns {type(built).__name__}"
    return built


def _lacking(node: Mapping[str, object]) -> dict[str, None]:
    """The parameters of a shipped target that the node of an earlier run may lack, see `settings.Role.later`."""
    known = schemas()["targets"].get(str(node["_target_"]), Schema()).get("properties", {})
    return {name: None for name, schema in known.items() if schema.get("role", {}).get("later")}


def record_type(method: Mapping[str, object]) -> str:
    """The record type that a method learns from. Only a method of the user's own is imported to find out."""
    target = str(method["_target_"])
    return schemas()["record_types"].get(target) or resolve_name(target).record_type
