"""README commands: composed and checked here, run as written under the marker `slow`."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from ftcore.cli.verbs import VERBS
from ftcore.cli.words import read_line
from ftcore.config.compose import load_config, own_arguments
from ftcore.files import PACKAGE
from ftcore.sweeps.sweep import read_sweep

README = (PACKAGE.parent / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
OURS = [line.split("&& ")[-1] for line in COMMANDS if "python -m ftcore" in line]


def words_of(command):
    return shlex.split(command, comments=True)[3:]


def test_the_first_two_blocks_install_and_run_and_install_and_test():
    assert BLOCKS[0].strip() == "pip install -c constraints.txt . && python -m ftcore"
    assert BLOCKS[1].strip() == "pip install -c constraints.txt -e '.[dev]' && pytest"
    assert "pip install --quiet -c constraints.txt -e '.[dev]'" in (PACKAGE.parent / ".ci" / "run").read_text()


@pytest.fixture(scope="module")
def finished():
    """config.yaml of a run."""
    return yaml.safe_dump(load_config([]))


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


@pytest.mark.slow
def test_the_other_commands_run_as_written(tmp_path):
    """Everyday commands in order, in a fresh folder; runs/a/b and runs/a/c are finished runs of the real model."""
    short = "max_steps=1 evaluate.max_rows=4 logger=none"
    for name in ("b", "c"):
        subprocess.run(f"{sys.executable} -m ftcore name={name} {short}", shell=True, cwd=tmp_path, check=True)
        (tmp_path / "runs" / "a").mkdir(exist_ok=True)
        next((tmp_path / "runs" / name).glob("*")).rename(tmp_path / "runs" / "a" / name)
    script = (
        "set -e\n"
        + BLOCKS[2]
        + "\n".join(c for c in COMMANDS if "python -m ftcore" in c and "&&" not in c and "qwen" not in c)
    )
    script = script.replace("python -m ftcore", f"{sys.executable} -m ftcore")
    script = re.sub(r"(adapter=dora method.lr=1e-3|model.path=runs/a/b|method=[\w,]+)", rf"\1 {short}", script)
    script = re.sub(r"(ftcore sweeps=seeds)", rf"\1 {short}", script)
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "rewards.py").write_text(
        "def brevity(completions, **_):\n    return [-len(c) / 100 for c in completions]\n"
    )
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)
