"""Shared helpers: a command line run in this process, in a folder of its own."""

import json
import os
from pathlib import Path

import pytest

from ftcore.cli.command import run_command
from ftcore.errors import PRIVATE
from ftcore.files import home

os.environ.setdefault("WANDB_MODE", "offline")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

FAST = ["model=tiny", "logger=none", "evaluate.max_rows=4", "evaluate.max_new_tokens=4", "evaluate.probe=null"]


def latest(*words: str) -> list[str]:
    """The words of a command in which a test sets a key of `FAST` anew: a command takes each key once."""
    return list({word if word.startswith("-") else word.partition("=")[0]: word for word in words}.values())


class Outcome:
    """Exit status, output and newest run folder of a command."""

    def __init__(self, status: int, out: str, err: str, folder: Path) -> None:
        self.status, self.out, self.err, self.cwd = status, out, err, folder
        runs = sorted((folder / "runs").glob("*/*/"), key=lambda path: path.stat().st_ctime_ns)
        self.folder = runs[-1] if runs else folder

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory):
    """Tests keep rows, scores and stages in a home of their own; converted weights alone are the user's."""
    models, own = home() / "models", tmp_path_factory.mktemp("home")
    models.mkdir(parents=True, exist_ok=True)
    (own / "models").symlink_to(models)
    os.environ["FTCORE_HOME"] = str(own)


@pytest.fixture(autouse=True)
def not_private():
    """A config with private=true holds for the processes that it starts, and in a test for no longer."""
    yield
    os.environ.pop(PRIVATE, None)


@pytest.fixture
def ftcore(tmp_path, monkeypatch, capfd):
    """Run `python -m ftcore <words>` in this process: `ftcore("method=sft", ...)`."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Outcome:
        capfd.readouterr()
        status = run_command(latest(*words))
        out, err = capfd.readouterr()
        return Outcome(status, out, err, tmp_path)

    return run


@pytest.fixture
def fails(ftcore):
    """Run a command that must fail with an exit status and a one-paragraph message without a traceback."""

    def run(status: int, *words: str) -> str:
        outcome = ftcore(*words)
        assert outcome.status == status, outcome.err
        assert "Traceback" not in outcome.err
        return outcome.err

    return run


@pytest.fixture
def rows(tmp_path):
    """Write rows (objects or raw lines) as a JSONL file and return its path."""

    def write(*lines, name="rows.jsonl") -> str:
        file = tmp_path / name
        texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        file.write_bytes(b"\n".join(texts) + b"\n")
        return str(file)

    return write
