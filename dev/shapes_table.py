"""Write the table of shapes in docs/data.md from the shapes themselves. `make schema`."""

from pathlib import Path

from ftcore.data.shapes import CONTEXT, REFUSED, SHAPES, SWITCH_COLUMNS

PAGE = Path(__file__).parent.parent / "docs/data.md"
BEGIN, END = "<!-- shapes -->\n", "<!-- end of shapes -->"


def table() -> str:
    """Shape x column x what happens."""
    lines = ["| shape | column | what happens |", "|---|---|---|"]
    for shape in SHAPES:
        lines.append(f"| {shape.name} | {_named(shape.columns)} | make the shape, used |")
        if shape.others:
            lines.append(f"| | {_named(shape.others)} | used where they are there |")
    lines.append(f"| every shape, and plain columns | {_named(sorted(CONTEXT))} | used: part of the conversation |")
    lines.append(
        f"| | {_named(sorted(SWITCH_COLUMNS))} | 0 or false leaves the row out and counts it; other numbers refused |"
    )
    lines.append(f"| | {_named(sorted(REFUSED))} | refused where they hold something |")
    lines.append("| | any other | listed once as not used (rewards may read it) |")
    return "\n".join(lines) + "\n"


def _named(columns: object) -> str:
    return ", ".join(f"`{column}`" for column in columns)  # type: ignore[attr-defined]


def written() -> str:
    """The page with the table of now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
