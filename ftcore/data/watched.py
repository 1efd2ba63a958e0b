"""Contents that notice when a chat template looks at them.

Where a template only writes contents down, what it writes around them is the same whatever they say.
"""

import re
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

# With characters that escaping would change, so that no escaped content passes for a plain one.
PLACEHOLDER = 'ftcore"{}{}\nend'
FOUND = re.compile(PLACEHOLDER.format("(content|trimmed)", r"(\d+)"))
# Filters that write a content as it is, and parts of a template whose results `Watched` cannot follow.
PLAIN_FILTERS = {"trim", "string", "length", "tojson"}
OPAQUE = (nodes.Macro, nodes.CallBlock, nodes.AssignBlock, nodes.FilterBlock, nodes.Concat)


class Watched(str):
    """A content that notes in `seen` when a template does more with it than write it down or trim it."""

    seen: list[str]

    def __new__(cls, text: str, seen: list[str]) -> "Watched":
        """The text, with the list that takes notes."""
        new = super().__new__(cls, text)
        new.seen = seen
        return new

    def __getattribute__(self, name: str) -> Any:
        if name == "strip":
            return lambda characters=None: self._trimmed(characters)
        if not name.startswith("_") and name != "seen":
            self.seen.append(name)
        return super().__getattribute__(name)

    def _trimmed(self, characters: str | None) -> "Watched":
        if characters is not None or not FOUND.fullmatch(self):
            self.seen.append("strip")
        return Watched(str.replace(self, "content", "trimmed", 1), self.seen)

    def __add__(self, other: str) -> "Watched":
        return Watched(str.__add__(self, other), self.seen)

    def __radd__(self, other: str) -> "Watched":
        return Watched(str.__add__(other, self), self.seen)

    def __bool__(self) -> bool:  # contents are never empty
        return True

    def __eq__(self, other: object) -> bool:
        return self._compared(other)

    def __ne__(self, other: object) -> bool:
        return not self._compared(other)

    def _compared(self, other: object) -> bool:
        if other not in (None, ""):
            self.seen.append("==")
        return str.__eq__(self, other) is True  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return str.__hash__(self)


def _noting(name: str) -> Any:
    def noted(self: Watched, *args: Any) -> Any:
        self.seen.append(name)
        return getattr(str, name)(self, *args)

    return noted


for _name in ("contains", "len", "getitem", "iter", "lt", "le", "gt", "ge", "mul", "rmul", "mod", "rmod", "format"):
    setattr(Watched, f"__{_name}__", _noting(f"__{_name}__"))


def watch(source: str, roles: tuple[str, ...], names: dict[str, str]) -> str | None:
    """What a template writes for placeholders of these roles, if it does no more with contents than writing or trimming them.

    None when it does, or when it cannot be told. `names` are the special tokens. The text has "trimmed" where a content is.
    """
    seen: list[str] = []
    messages = [{"role": r, "content": Watched(PLACEHOLDER.format("content", k), seen)} for k, r in enumerate(roles)]
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        tree = environment.parse(source)
        text = environment.from_string(source).render(messages=messages, add_generation_prompt=False, **names)
    except Exception:  # a program may raise anything, and use what only transformers knows
        return None
    filters = {node.name for node in tree.find_all(nodes.Filter)}
    formats = any(isinstance(node.left, nodes.Const) for node in tree.find_all(nodes.Mod))
    return None if seen or formats or not filters <= PLAIN_FILTERS or any(tree.find_all(OPAQUE)) else text
