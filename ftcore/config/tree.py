"""Dotted paths through nested mappings."""

from collections.abc import Iterator, MutableMapping


def flatten(node: object, path: str = "", in_lists: bool = False) -> Iterator[tuple[str, object]]:
    """(dotted path, value) of everything that is not a mapping with keys. With `in_lists`, items of lists too: `a.0`."""
    if isinstance(node, list) and in_lists:
        node = dict(enumerate(node))
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from flatten(value, f"{path}.{key}" if path else str(key), in_lists)
    else:
        yield path, node


def put(node: object, path: str, value: object) -> None:
    """Set the value at a dotted path, adding mappings on the way."""
    *parts, last = path.split(".")
    for part in parts:
        assert isinstance(node, MutableMapping)
        node = node.setdefault(part, {})
    assert isinstance(node, MutableMapping)
    node[last] = value


def above(path: str) -> Iterator[str]:
    """The path and all paths above it: `a.b`, `a`."""
    while path:
        yield path
        path = path.rpartition(".")[0]
