"""Imports inside the package run down only, in no circle, and what checks a config imports nothing heavy.

An import counts wherever it stands, inside functions and under TYPE_CHECKING too. So does a string that names a module or
something in one: "ftcore.verbs.finished:chat", "ftcore.runs.preload".
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [  # from top to bottom; places of one line import none of each other. A circle of folders needs an import upward.
    "__main__", "cli", "sharing", "sweeps", "verbs ui plan export", "runs", "train", "evaluate", "methods", "models",
    "rollout", "data", "config", "rewards", "kernels", "machine", "ground",
]  # fmt: skip
GROUND = ("__init__", "errors", "files", "settings", "run_folder", "console", "timing")  # files beside the folders
LEVEL = {place: level for level, places in enumerate(LAYERS) for place in places.split()}


def place_of(path: str) -> str:
    """The layer of a file: its folder right below ftcore/, or `ground`."""
    first = Path(path).with_suffix("").parts[1]
    return "ground" if first in GROUND else first


def file_of(name: str) -> str:
    """The file of what a dotted name names, a module or something in one; empty if nothing is there."""
    for module, member in ((name, ""), name.rpartition(".")[::2]):
        for file in (f"{module.replace('.', '/')}.py", f"{module.replace('.', '/')}/__init__.py"):
            if (ROOT / file).exists() and re.search(rf"\b{member}\b", (ROOT / file).read_text()):
                return file
    return ""


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import of the package in a file."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            found = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"ftcore(\.\w+)+(:\w+)?", str(node.value)):
            found = [node.value.replace(":", ".")]
        yield from ((node.lineno, name) for name in found if re.match(r"ftcore\b", name))


FILES = sorted((ROOT / "ftcore").rglob("*.py"))
IMPORTS = [(str(file.relative_to(ROOT)), line, name) for file in FILES for line, name in imports(file)]


def test_every_file_has_a_layer():
    stray = [str(file) for file in FILES if place_of(str(file.relative_to(ROOT))) not in LEVEL]
    assert not stray, f"{stray}: move each into a folder; a new folder gets its line in LAYERS"


def test_imports_run_down_only():
    upward = []
    for file, line, name in IMPORTS:
        start, end = place_of(file), place_of(file_of(name) or file)
        if start != end and LEVEL[end] <= LEVEL[start]:
            upward.append(f"{file}:{line}: {name}")
    assert not upward, "\n".join(["import nothing from above: move it down, or get it as an argument", *upward])


def test_no_files_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for file, _, name in IMPORTS:
        graph.setdefault(file, set()).update({file_of(name)} - {file, ""})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        steps = list(zip(error.args[1][1:], error.args[1], strict=False))
        lines = [f"{file}:{line}: {name}" for file, line, name in IMPORTS if (file, file_of(name)) in steps]
        pytest.fail("\n".join(["take one of these imports out of the circle:", *lines]))


def test_dotted_names_name_something_that_exists():
    targets = [
        (str(file.relative_to(ROOT)), number, match[1])
        for file in sorted((ROOT / "conf").rglob("*.yaml"))
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if (match := re.search(r"_target_: *(ftcore\.[\w.]+)", line))
    ]
    wrong = [f"{file}:{line}: {name}" for file, line, name in IMPORTS + targets if not file_of(name)]
    assert targets and not wrong, "\n".join(["correct these names:", *wrong])


@pytest.mark.parametrize("folder", ["models", "train", "methods"])
def test_a_folder_by_itself_imports_nothing(folder):
    file = ROOT / "ftcore" / folder / "__init__.py"
    _, *rest = ast.parse(file.read_text()).body
    assert not rest, f"{file}:{rest[0].lineno}: leave the docstring only, or checking a config loads torch"


def test_checking_a_config_imports_nothing_heavy():
    heavy = ("torch", "transformers", "lightning", "peft", "numpy", "pyarrow")
    code = "import sys, ftcore.cli.command; from ftcore.config.compose import load_config; load_config(['method=dpo'])"
    code += f"; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stdout + result.stderr
