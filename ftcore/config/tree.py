"""Dotted paths through nested mappings."""

from collections.abc import Iterator, Mapping, MutableMapping


def leaves(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) of all that is no mapping with keys; lists are whole."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def put(node: object, path: str, value: object) -> None:
    """Set the value at a dotted path; mappings on the way are made."""
    *parts, last = path.split(".")
    for part in parts:
        assert isinstance(node, MutableMapping)
        node = node.setdefault(part, {})
    assert isinstance(node, MutableMapping)
    node[last] = value


def above(path: str) -> Iterator[str]:
    """A path and those it lies below: `a.b`, `a`."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def all_leaves(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) of all scalars; items of a list are counted from 0."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        yield path, node
        return
    for key, value in items:
        yield from all_leaves(value, f"{path}.{key}".strip("."))
