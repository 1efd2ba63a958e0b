"""Commands of README.md and docs/: composed and checked here, run as written under the marker `slow`."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from ftcore.cli.verbs import VERBS
from ftcore.cli.words import read_line
from ftcore.config.compose import load_config, of_run, own_arguments
from ftcore.files import PACKAGE
from ftcore.sweeps.sweep import read_sweep

ROOT = PACKAGE.parent
README = (ROOT / "README.md").read_text()
DOCS = {file: file.read_text() for file in sorted((ROOT / "docs").glob("*.md")) if file.name != "reference.md"}
PAGES = {ROOT / "README.md": README, **DOCS, ROOT / "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()}
BLOCK = re.compile(r"^```bash\n(.*?)```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    (.*-m ftcore .*)", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")
BLOCKS = BLOCK.findall(README)
# What a reader types; a command that stands on two pages runs once.
LINES = [line for text in (README, *DOCS.values()) for block in BLOCK.findall(text) for line in block.splitlines()]
COMMANDS = list(dict.fromkeys(re.split(r"\s#", line)[0].strip() for line in LINES))
# Indented ones need a cluster, or files that are not there: they compose.
SHOWN = [command for text in DOCS.values() for command in INDENTED.findall(text)]
OURS = [line.split("&& ")[-1] for line in [*COMMANDS, *SHOWN] if "-m ftcore" in line]


def words_of(command):
    words = shlex.split(command, comments=True)
    return words[words.index("ftcore") + 1 :]


def test_the_first_two_blocks_install_and_run_and_install_and_test():
    assert BLOCKS[0].strip() == "pip install -c constraints.txt . && python -m ftcore"
    assert BLOCKS[1].strip() == "pip install -c constraints.txt -e '.[dev]' && pytest"
    assert "pip install --quiet -c constraints.txt -e '.[dev]'" in (ROOT / ".ci" / "run").read_text()


@pytest.fixture(scope="module")
def finished():
    """config.yaml of a run."""
    return yaml.safe_dump(of_run(load_config([])))


@pytest.mark.parametrize("command", [c for c in OURS if "--help" not in c])
def test_every_command_composes(command, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b", "c"):
        (tmp_path / "runs" / "a" / name).mkdir(parents=True)
        (tmp_path / "runs" / "a" / name / "config.yaml").write_text(finished)
    line = read_line(words_of(command))
    words = line.overrides
    if VERBS[line.verb].before_config:
        _, words = own_arguments(line.verb, words[1:])
    if "--multirun" in line.flags or "sweeps=" in command:
        assert read_sweep(words, tuple(line.config_dirs))[1]
    else:
        assert load_config(words, tuple(line.config_dirs))["name"]


def anchors(file):
    """The names by which GitHub links to the headings of a page."""
    titles = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_place(page):
    for path, place in LINK.findall(PAGES[page]):
        target = page.parent / path if path else page
        assert target.exists() and (not place or place in anchors(target)), f"{path}#{place}"


@pytest.mark.slow
def test_the_main_job_learns_and_forgets_little(tmp_path):
    """The first command's second half, as written; its figures stand in dev/LOG.md."""
    subprocess.run([sys.executable, "-m", "ftcore"], cwd=tmp_path, check=True)
    (folder,) = (tmp_path / "runs").glob("*/*")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tuned"]["accuracy"] >= 0.75
    assert summary["accuracy_gain"] >= 0.50
    assert summary["probe_perplexity_rise"] <= 0.10
    command = [sys.executable, "-m", "ftcore", "chat", f"run={folder}", "prompt=How do I find a broken bone?"]
    answer = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "x-ray" in answer.lower()


SHORT = "max_steps=1 evaluate.max_rows=4 logger=none"


def shortened(command):
    """A command that trains, with one step and few rows where it does not say how many."""
    line = read_line(words_of(command)) if "--help" not in command else None
    trains = line and line.verb == "train" and "--cfg" not in line.flags and "resume=runs" not in command
    return f"{command} {SHORT}" if trains and "max_steps=" not in command else command


@pytest.mark.slow
def test_the_other_commands_run_as_written(tmp_path):
    """Commands in order, in a fresh folder; runs/a/b and runs/a/c are finished runs of the real model."""
    for name in ("b", "c"):
        subprocess.run(f"{sys.executable} -m ftcore name={name} {SHORT}", shell=True, cwd=tmp_path, check=True)
        (tmp_path / "runs" / "a").mkdir(exist_ok=True)
        next((tmp_path / "runs" / name).glob("*")).rename(tmp_path / "runs" / "a" / name)
    ours = [c for c in COMMANDS if c.startswith("python -m ftcore") and "qwen" not in c and c not in BLOCKS[2]]
    script = "\n".join(["set -e", BLOCKS[2], *map(shortened, ours)])
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "rewards.py").write_text(
        "def brevity(completions, **_):\n    return [-len(c) / 100 for c in completions]\n"
    )
    script = script.replace("python -m ftcore", f"{sys.executable} -m ftcore")
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)
