"""One fact stands in one place: names of a run's files in ftcore/run_folder.py, lists of config keys in ftcore/settings.py.

And one way leads to the terminal: ftcore/console.py.
"""

import ast
import re
from pathlib import Path
from textwrap import dedent

import yaml

ROOT = Path(__file__).parents[1]
RUN_FILES = {
    "config.yaml", "summary.json", "metrics.jsonl", "samples.jsonl", "row_scores.jsonl", "ledger.parquet",
    "profile.txt", "profile.json"
}  # fmt: skip
SHIPPED = ("CONF", "'conf'")  # conf/config.yaml is no file of a run
MAY_LIST_KEYS = {
    "ftcore/settings.py",
    "ftcore/cli/verbs.py",  # the table of verbs; those with arguments of their own have a key of their name
    "ftcore/config/schema.py",  # keys of lightning.Trainer, some of which are called like ours
}


def nodes(*besides: str) -> list[tuple[str, ast.AST]]:
    """Each syntax node of the package with its place (file:line), except for those of some files."""
    files = [file for file in sorted((ROOT / "ftcore").rglob("*.py")) if str(file.relative_to(ROOT)) not in besides]
    trees = [(file.relative_to(ROOT), ast.parse(file.read_text())) for file in files]
    return [(f"{file}:{getattr(node, 'lineno', 0)}", node) for file, tree in trees for node in ast.walk(tree)]


def keys() -> set[str]:
    """The top-level keys of the config, groups too."""
    top = yaml.safe_load((ROOT / "conf/config.yaml").read_text())
    return {*top, *(name for entry in top["defaults"] if isinstance(entry, dict) for name in entry)} - {"defaults"}


def held(node: ast.AST) -> set[str]:
    """The strings in a literal tuple, list or set, or as keys of a literal dict that says something of each."""
    is_table = isinstance(node, ast.Dict) and all(isinstance(value, ast.Constant) for value in node.values)
    parts = node.keys if is_table else getattr(node, "elts", [])  # another dict gives the keys their values
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def test_names_of_a_runs_files_stand_in_run_folder():
    found = nodes("ftcore/run_folder.py")
    divided = [node for _, node in found if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)]
    shipped = {id(node.right) for node in divided if ast.unparse(node.left).endswith(SHIPPED)}
    texts = [(place, node.value) for place, node in found if isinstance(node, ast.Constant) and id(node) not in shipped]
    wrong = [f"{place}: {text}" for place, text in texts if str(text).rpartition("/")[2] in RUN_FILES]
    assert not wrong, "\n".join(["let Run(folder) of ftcore/run_folder.py name a run's files:", *wrong])


def test_lists_of_config_keys_stand_in_settings():
    known = keys()
    lists = [(place, held(node) & known) for place, node in nodes(*MAY_LIST_KEYS)]
    wrong = [f"{place}: {', '.join(sorted(names))}" for place, names in lists if len(names) >= 3]
    assert not wrong, "\n".join(["take these keys from ftcore/settings.py, by what they are for:", *wrong])


def is_another_way_to_the_terminal(node: ast.AST) -> bool:
    """Whether something prints past our console: `print`, a Console of rich's own, or its markup."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich":
        return bool({"Console", "get_console", "print", "track"} & {alias.name for alias in node.names})
    if isinstance(node, ast.Call):
        name, given = ast.unparse(node.func).rpartition(".")[2], {word.arg for word in node.keywords}
        return name == "from_markup" or {"Progress": "console", "TextColumn": "markup"}.get(name) not in {None, *given}
    return ast.unparse(node) == "print"


def test_what_is_printed_goes_through_one_console():
    wrong = [place for place, node in nodes("ftcore/console.py") if is_another_way_to_the_terminal(node)]
    assert not wrong, "\n".join(["print with `plain`, `console` or `stderr` of ftcore/console.py:", *wrong])


def test_examples_for_contributors_run_and_keep_to_the_console():
    blocks = re.findall(
        r"^( *)```python\n(.*?)^\1```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 2
    for _, block in blocks:
        source = dedent(block)
        exec(compile(source, "CONTRIBUTING.md", "exec"), {"__name__": "example"})  # what it imports is there
        assert not any(map(is_another_way_to_the_terminal, ast.walk(ast.parse(source))))
