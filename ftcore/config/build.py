"""From a checked node to what its `_target_` names."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from ftcore.config.recipe_rules import recipe_folders
from ftcore.files import PACKAGE, resources
from ftcore.settings import FILES, Config

TRUSTED = "FTCORE_TRUST"


TRUST_ADVICE = "to use a module of your own, give trust=[{}] on the command line"


MAX_ALIASES = 20  # of an earlier run's config.yaml; 2^20 leaves at most


def locate(node: Mapping[str, Any]) -> Any:
    """The class or function that a checked node's `_target_` names."""
    return resolve_name(node["_target_"])


def build(node: Mapping[str, Any], *given: Any) -> Any:
    """Call a checked node's target with the program's own arguments first and the node's keys after."""
    return locate(node)(*given, **{key: value for key, value in node.items() if key != "_target_"})


def record_type(method: Mapping[str, Any]) -> str:
    """The record type that a method needs, without importing it unless it is a user's own."""
    return schemas()["record_types"].get(method["_target_"]) or locate(method).record_type


def schemas() -> Config:
    """ftcore/schema.json: what every key of the config may be."""
    return json.loads((PACKAGE / "schema.json").read_text())


def options(group: str, config_dirs: Iterable[Path] = ()) -> list[str]:
    """Names that `group=<name>` accepts, sorted; names with a leading underscore are shared parts, not options."""
    folders = [folder / group for folder in (resources() / "conf", *config_dirs)]
    if group in FILES:
        folders = recipe_folders(tuple(config_dirs), group)
    names = {file.stem for folder in folders for file in folder.glob("*.yaml")}
    return sorted(name for name in names if not name.startswith("_"))


def read_config(file: Path) -> Any:
    """What config.yaml of an earlier run says; None when it cannot be read, or its aliases would multiply."""
    try:
        text = file.read_text(encoding="utf-8")
        return None if len(re.findall(r"(^|[\s,:\[{-])\*\w", text)) > MAX_ALIASES else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def is_trusted(name: str, trust: Iterable[str]) -> bool:
    """Whether a dotted name lies in one of the modules that the command line trusts."""
    return any(name.startswith(f"{module}.") for module in trust)
