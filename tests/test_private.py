"""private=true: a thousand marked rows, and not one of their marks in what a run writes or says."""

import os
import re

import pytest

from ftcore.errors import PRIVATE
from tests.conftest import FAST

MARKS = [f"zq{k:04d}xv" for k in range(2000)]  # of a thousand questions and their answers
MARK = re.compile(rb"zq\d{4}xv")
PRIVATE_RUN = [*FAST, "hardware=cpu", "data=jsonl", "max_steps=2", "global_batch_size=8", "retention.weight=0",
               "data.test_share=0.05", "evaluate.max_rows=20", "data.too_long=truncate", "ledger=true", "logger=wandb",
               "logger.mode=offline"]  # fmt: skip
OWN = '''
import sys

from ftcore.data import Data
from ftcore.methods.sft import SFT


def broken(prompts, completions, answer, **columns):
    print(prompts, completions, answer)
    print(prompts, file=sys.stderr)
    raise ValueError(f"{prompts} {completions} {answer}")


class Raising(SFT):
    """Quotes the rows it gets."""

    def encode(self, rows):
        raise ValueError(str(rows))


class Breaking(Data):
    """Rows that cannot be read."""

    def load(self, record_type):
        rows = super().load(record_type).train
        try:
            raise KeyError(rows[0]["prompt"])
        except KeyError as error:
            raise RuntimeError(str(rows[1])) from error
'''


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Stores of this test's own, the switch put back, and a module that a user trusts."""
    monkeypatch.setenv("FTCORE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(PRIVATE, "0")
    (tmp_path / "leaky.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def marked(rows):
    """A file in which every prompt has a mark of its own, and every answer one too."""

    def row(k):
        answer = f"It is {MARKS[2 * k + 1]}."
        return {"prompt": f"What is {MARKS[2 * k]}?", "completion": answer, "chosen": answer, "rejected": f"No {MARKS[k]}.",
                "answer": MARKS[2 * k + 1]}  # fmt: skip

    return f"data.path={rows(*map(row, range(1000)))}"


def found(outcome, *folders):
    """The marks in what was printed and in every file of the folders, binary ones too."""
    said = (outcome.out + outcome.err).encode()
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    assert files or not folders
    return {mark for content in (said, *(file.read_bytes() for file in files)) for mark in MARK.findall(content)}


@pytest.mark.parametrize(
    ("method", "words"), [("sft", []), ("grpo", ["method.rewards=[contains_answer]"]), ("dpo", [])]
)
def test_nothing_of_a_private_row_is_written_or_said(ftcore, tmp_path, marked, method, words):
    command = [*PRIVATE_RUN, marked, f"method={method}", *words]
    private = ftcore(*command, "private=true")
    assert private.status == 0, private.err
    runs = tmp_path / "runs"
    assert list(runs.rglob("*.wandb")) and (private.folder / "samples.jsonl").read_text().count("base_right") == 20
    assert not found(private, runs, tmp_path / "home")
    if method != "sft":
        return
    assert "wrong" in private.out  # which rows, without their text
    for verb in ("eval", "compare", "inspect"):
        outcome = ftcore(verb, f"run={private.folder}", "hardware=cpu")
        assert outcome.status == 0, outcome.err
        assert not found(outcome, runs), verb
        assert not MARK.search(b"".join(page.read_bytes() for page in tmp_path.glob("inspect-*.html")))
    chat = ftcore("chat", f"run={private.folder}", "prompt='What is it?'")
    assert chat.status == 0 and chat.out


def test_without_private_the_same_run_shows_some(ftcore, tmp_path, marked):
    outcome = ftcore(*PRIVATE_RUN, marked, "method=sft")
    assert outcome.status == 0
    assert found(outcome) and found(outcome, outcome.folder)
    (file,) = outcome.folder.rglob("*.wandb")
    shown = outcome.cwd.glob("runs/**/media/table/samples*.json")
    assert MARK.search(file.read_bytes()) or any(MARK.search(table.read_bytes()) for table in shown)
    assert MARK.search(ftcore("inspect", f"run={outcome.folder}").out.encode())


@pytest.mark.parametrize("private", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_what_a_reward_function_prints_and_raises_is_withheld(ftcore, tmp_path, marked, private):
    rewards = ["method=grpo", "method.rewards=[leaky.broken]", "trust=[leaky]"]
    outcome = ftcore(*PRIVATE_RUN, marked, *rewards, f"private={private}")
    assert outcome.status == 8 and "ValueError" in outcome.err
    assert bool(found(outcome, tmp_path / "runs")) == (private == "false")


@pytest.mark.parametrize("debug", ["", "1"])
def test_an_unexpected_error_shows_lines_of_code_and_no_message(ftcore, tmp_path, marked, monkeypatch, debug):
    monkeypatch.setenv("FTCORE_DEBUG", debug)
    words = [*PRIVATE_RUN, marked, "data._target_=leaky.Breaking", "trust=[leaky]"]
    outcome = ftcore(*words, "private=true")
    assert outcome.status == 1
    assert "RuntimeError (message withheld" in outcome.err and "leaky.py" in outcome.err
    assert not found(outcome)
    with pytest.raises(RuntimeError, match="zq"):
        ftcore(*words)


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_and_their_errors_are_private_too(ftcore, tmp_path, marked, monkeypatch):
    words = [word for word in PRIVATE_RUN if word != "hardware=cpu"] + ["hardware=ddp_2cpu", marked, "private=true"]
    outcome = ftcore(*words)
    assert outcome.status == 0, outcome.err
    assert not found(outcome, tmp_path / "runs")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    outcome = ftcore(*words, "method._target_=leaky.Raising", "trust=[leaky]")
    assert outcome.status and "ValueError (message withheld" in outcome.err, outcome.err
    assert not found(outcome, tmp_path / "runs")


@pytest.mark.slow
def test_a_stage_is_as_private_as_the_run_that_it_is_for(ftcore, tmp_path, marked):
    stages = [
        "method=rlhf",
        "method.stages={policy: ['method=sft', 'max_steps=1'], reward_model: ['method=reward', 'max_steps=1']}",
    ]
    outcome = ftcore(*PRIVATE_RUN, marked, *stages, "private=true")
    assert outcome.status == 0, outcome.err
    assert list((tmp_path / "home" / "stages").glob("*/samples.jsonl"))
    assert not found(outcome, tmp_path / "runs", tmp_path / "home")
