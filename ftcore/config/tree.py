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


def differing(before: object, after: object) -> dict[str, tuple[object, object]]:
    """Dotted path -> its values before and after, of what two nested mappings differ in; None where one has no such key."""
    old, new = dict(flatten(before)), dict(flatten(after))
    return {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }


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
