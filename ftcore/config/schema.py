"""JSON schemas from signatures (`make schema` writes ftcore/schema.json).

A node's keys are the keyword-only parameters of its `_target_`; the program passes the others. Where a class takes `**kwargs`,
the parameters of its base class belong to it too. Types are the annotations, ranges their `Annotated` part.
"""

import inspect
import json
from collections.abc import Mapping
from pkgutil import resolve_name
from types import FunctionType
from typing import NotRequired, get_type_hints

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ftcore.config.yaml_source import read
from ftcore.files import resources
from ftcore.settings import CHOSEN, Config, Hardware, Role

# Keys of lightning.Trainer that the run sets itself, besides those of the hardware group.
TRAINER_OWNED = [
    "accumulate_grad_batches", "callbacks", "default_root_dir", "enable_progress_bar", "gradient_clip_val",
    "limit_train_batches", "limit_val_batches", "logger", "max_epochs", "max_time", "max_steps", "plugins",
    "use_distributed_sampler", "val_check_interval",
]  # fmt: skip


def parameters(target: type | FunctionType) -> dict[str, object]:
    """Keyword-only parameter -> annotation, of a function or of a class and its base classes."""
    classes = target.__mro__ if isinstance(target, type) else ()
    found: dict[str, object] = {}
    for function in [vars(c)["__init__"] for c in classes if "__init__" in vars(c)] or [target]:
        signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                found.setdefault(name, hints.get(name, object))
        if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            break
    return dict(sorted(found.items()))


def schema_of(target: type | FunctionType) -> dict[str, object]:
    """JSON schema of a config node with this target: every parameter that is not `later` is required, no other key is known."""
    named = parameters(target).items()
    node = TypedDict("node", {name: NotRequired[kind] if _is_later(kind) else kind for name, kind in named})  # type: ignore[misc]
    return _json_schema(node)


def _is_later(annotation: object) -> bool:
    """Whether earlier runs may lack a parameter with this annotation, see `settings.Role`."""
    return any(isinstance(part, Role) and part.later for part in getattr(annotation, "__metadata__", ()))


def _json_schema(node: type) -> dict[str, object]:
    schema = TypeAdapter(node).json_schema()
    return _closed(schema, schema.get("$defs", {}))  # type: ignore[return-value]


def _closed(node: object, definitions: Mapping[str, dict[str, object]]) -> object:
    """The schema without references and docstrings, in which a mapping that lists its keys has no others."""
    if isinstance(node, list):
        return [_closed(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        others, node = dict(definitions), dict(node)
        found = others.pop(node.pop("$ref").rpartition("/")[2], {})  # a type inside itself is {}: not checked
        return _closed({**found, **node}, others)
    lists_keys = node.get("type") == "object" and "properties" in node
    left_out = {"$defs": dict, "title": str, "description": str}
    closed = {k: _closed(v, definitions) for k, v in node.items() if not isinstance(v, left_out.get(k, ()))}
    return {"additionalProperties": False, **closed} if lists_keys else closed


def shipped_targets() -> dict[str, list[str]]:
    """Group -> the `_target_`s of its shipped options."""
    files = {group: (resources() / "conf" / group).glob("*.yaml") for group in CHOSEN}
    return {group: sorted({str(read(file).value("_target_")) for file in files[group]} - {"None"}) for group in CHOSEN}


def build() -> str:
    """The content of schema.json."""
    import lightning

    groups = shipped_targets()
    targets = {name: resolve_name(name) for names in groups.values() for name in names}
    schema = {
        "top": _json_schema(Config),
        "targets": {name: schema_of(target) for name, target in targets.items()},
        "record_types": {name: t.record_type for name, t in targets.items() if hasattr(t, "record_type")},
        "groups": groups,
        "trainer_keys": sorted(set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}),
        "trainer_owned": sorted({*TRAINER_OWNED, *Hardware.__annotations__}),
    }
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"
