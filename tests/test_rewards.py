"""Reward functions by hand-computed values, and every way in which one can fail, through the real worker process."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from ftcore.errors import ConfigError, RewardError, described
from ftcore.rewards.functions import FUNCTIONS, check_reward, locate_reward
from ftcore.rewards.worker import Rewards
from tests.conftest import FAST

LIMIT = 1.5
SECRET = "Jane Doe, born 1970"
# One function for every test: the column `do` says how it behaves, row by row or for the whole batch.
MY_REWARDS = """
import os, re, sys, time
from fractions import Fraction

def act(prompts, completions, completion_ids, do, **columns):
    if do[0] in BATCH:
        return BATCH[do[0]](completions)
    return [ROW[kind](text) for kind, text in zip(do, completions)]

def shout(completions):
    print(completions, flush=True)
    os.write(1, b"\\x00\\xff straight to the descriptor")
    return [2.0] * len(completions)

def numpy_values(completions):
    import numpy
    return numpy.arange(len(completions), dtype="float32")

def columns_seen(completions, **columns):
    return [float(sorted(columns) == ["completion", "completion_ids", "do", "extra", "prompts"])] * len(completions)

def ids_and_extra(prompts, completion_ids, extra, **columns):
    return [len(prompt) + sum(ids) + (value or 0) for prompt, ids, value in zip(prompts, completion_ids, extra)]

def fails(completions, **columns):
    raise RuntimeError(f"cannot judge {completions}")

def torch_values(completions, **columns):
    import torch
    return [torch.tensor(0.5), torch.tensor([0.25]), torch.ones(2)]

def hang(completions, pid_file, **columns):
    with open(pid_file[0], "w") as file:
        file.write(f"{os.getpid()}\\n")
    re.fullmatch("(a+)+b", "a" * 60)

def grandchild(completions, pid_file, **columns):
    import subprocess
    process = subprocess.Popen(["sleep", "60"])
    with open(pid_file[0], "w") as file:
        file.write(f"{process.pid}\\n")
    process.wait()

ROW = {
    "one": lambda text: 1.0, "raise": lambda text: {}[text], "exit": lambda text: sys.exit(text),
    "interrupt": lambda text: (_ for _ in ()).throw(KeyboardInterrupt(text)), "none": lambda text: None,
    "nan": lambda text: float("nan"), "inf": lambda text: -float("inf"), "right": lambda text: True,
    "text": lambda text: text, "list": lambda text: [1.0], "huge": lambda text: 10**400,
    "fraction": lambda text: Fraction(3, 4), "int": lambda text: 7,
}
BATCH = {
    "short": lambda completions: [1.0] * (len(completions) - 1), "nothing": lambda completions: None,
    "string": lambda completions: "1" * len(completions), "dict": lambda completions: dict.fromkeys(completions, 1.0),
    "sleep": lambda completions: time.sleep(60), "regex": lambda completions: re.fullmatch("(a+)+b", "a" * 60),
    "die": lambda completions: os._exit(0), "abort": lambda completions: os.kill(os.getpid(), 11),
    "shout": shout, "numpy": numpy_values, "stdin": lambda completions: [float(len(sys.stdin.read()))] * len(completions),
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of modules that the worker can import."""
    path = tmp_path_factory.mktemp("modules")
    (path / "my_rewards.py").write_text(MY_REWARDS)
    (path / "my_rewardsx.py").write_text(f"open({str(path / 'imported')!r}, 'w').close()\ndef good(**columns): pass")
    (path / "leaves.py").write_text("import sys\nsys.exit('on import')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        yield path


@pytest.fixture(scope="module")
def shared(folder):
    """Rewards that never stop for failures, with one worker for as many tests as it survives."""
    with rewards("my_rewards.act", "length", weights=[2.0, 1.0], options={"length": {"limit": 2}}) as made:
        yield made


def rewards(*names, weights=None, options=None, share=1.0, limit=LIMIT, trust=("my_rewards",)):
    weights = weights or [1.0] * len(names)
    fixed = {"time_limit": limit, "max_failed_share": share, "trust": list(trust)}
    return closing(Rewards(list(names), weights, options or {}, **fixed))


def scored(made, *kinds, texts=None):
    """Score one completion for each kind of behaviour."""
    texts = texts or ["yes"] * len(kinds)
    return made.score(["Q"] * len(kinds), texts, [[1]] * len(kinds), [{"do": kind} for kind in kinds])


CHOICE_FORMS = [
    "B",
    "b",
    "(B)",
    "B.",
    "B) Paris",
    "B. Because (A) is wrong",
    "The answer is B.",
    "Answer: (B)",
    "**Answer:** B",
]


@pytest.mark.parametrize(
    ("name", "completion", "row", "expected"),
    [
        ("exact_match", " An X-ray!", {"answer": "an x ray"}, 1.0),
        ("exact_match", "It is an X-ray.", {"answer": "an x ray"}, 0.0),
        ("exact_match", "six", {"answer": ["five", "Six"]}, 1.0),
        ("exact_match", "", {"answer": "+"}, 0.0),
        ("exact_match", "Six.", {"completion": "six"}, 1.0),
        ("exact_match", "six", {"completion": "a long text of more than eight words is no answer"}, None),
        ("exact_match", "six", {}, None),
        ("contains_answer", "It is an X-ray.", {"answer": "x ray"}, 1.0),
        ("contains_answer", "Sixteen", {"answer": "six"}, 0.0),
        ("contains_answer", "", {"answer": "+"}, 0.0),
        ("contains_answer", "six", {"answer": []}, None),
        *[("multiple_choice", form, {"answer": "B"}, 1.0) for form in CHOICE_FORMS],
        *[("multiple_choice", form, {"answer": "(C)"}, 0.0) for form in CHOICE_FORMS],
        ("multiple_choice", "A. is tempting, but I think the answer is C.", {"answer": "C. Rome"}, 1.0),
        ("multiple_choice", "Option A is wrong. Option D is right.", {"answer": "D"}, 1.0),
        ("multiple_choice", "Answer: I think it is D", {"answer": "D"}, 1.0),
        ("multiple_choice", "The answer is a guess.", {"answer": "A"}, 0.0),
        ("multiple_choice", "B", {"answer": "Paris"}, None),
        ("numeric_answer", "3 + 4 = 7.0 apples.", {"answer": "7"}, 1.0),
        ("numeric_answer", "That is $1,234.50.", {"answer": "1234.5"}, 1.0),
        ("numeric_answer", "1,2,3", {"answer": "123"}, 0.0),
        ("numeric_answer", "It fell to -5", {"answer": "5"}, 0.0),
        ("numeric_answer", "It fell to \u22125", {"answer": "-5"}, 1.0),
        ("numeric_answer", "10-5", {"answer": "5"}, 1.0),
        ("numeric_answer", ".5", {"answer": "0.50"}, 1.0),
        ("numeric_answer", "6.02e23", {"answer": "602" + "0" * 21}, 1.0),
        ("numeric_answer", "9007199254740993", {"answer": "9007199254740992"}, 0.0),
        ("numeric_answer", "none", {"answer": "They pay 4*18=72 in all.\n#### 72"}, 0.0),
        ("numeric_answer", "72", {"answer": "They pay 4*18=72 in all.\n#### 72"}, 1.0),
        ("numeric_answer", "7", {"answer": "seven"}, None),
    ],
)
def test_judges(name, completion, row, expected):
    columns = {key: [None, value] for key, value in row.items()}
    assert FUNCTIONS[name](completions=["?", completion], **columns) == [None, expected]


@pytest.mark.parametrize(
    ("name", "options", "completion", "expected"),
    [
        ("length", {"limit": 4}, "", 0.0),
        ("length", {"limit": 4}, "a b c d", 0.0),
        ("length", {"limit": 4}, "a b c d e", -0.25),
        ("length", {"limit": 4}, "a b c d e f g h", -1.0),
        ("length", {"limit": 4}, "word " * 100, -1.0),
        ("repetition", {}, "to be or not to be", 0.0),
        ("repetition", {"n": 2}, "to be or not To be", -1 / 5),
        ("repetition", {}, "la la la la la la", -3 / 4),
        ("repetition", {}, "la la", 0.0),
        ("format", {"pattern": "<a>.*</a>"}, "<a>two\nlines</a>", 1.0),
        ("format", {"pattern": "<a>.*</a>"}, "So: <a>one</a>", 0.0),
    ],
)
def test_penalties_and_format(name, options, completion, expected):
    assert FUNCTIONS[name](completions=[completion], answer=[None], **options) == [pytest.approx(expected)]


def test_weighted_sum_and_values_by_name(shared):
    totals, values = scored(shared, "one", "int", "fraction", texts=["a", "a b c", "a b c d e"])
    assert values == {"my_rewards.act": [1.0, 7.0, 0.75], "length": [0.0, -0.5, -1.0]}
    assert totals == [2.0, 13.5, 0.5]
    assert scored(shared) == ([], {"my_rewards.act": [], "length": []})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("raise", "KeyError"),
        ("exit", "SystemExit"),
        ("interrupt", "KeyboardInterrupt"),
        ("none", "returned None, no finite number"),
        ("nan", "returned float, no finite number"),
        ("inf", "returned float, no finite number"),
        ("text", "returned str, no finite number"),
        ("list", "returned list, no finite number"),
        ("huge", "returned int, no finite number"),
    ],
)
def test_a_failing_row_is_excluded_alone(shared, kind, reason, capfd):
    seen, failed = shared.seen, shared.failed["my_rewards.act"]
    totals, values = scored(shared, "one", kind, "one", texts=["a", SECRET, "c"])
    assert totals == [2.0, None, 2.0]
    assert values == {"my_rewards.act": [1.0, None, 1.0], "length": [0.0, -1.0, 0.0]}
    assert (shared.seen - seen, shared.failed["my_rewards.act"] - failed) == (3, 1)
    assert shared.failed["length"] == 0
    assert shared.reasons["my_rewards.act"].partition(" at my_rewards.py:")[0] == reason
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("short", "returned 2 values for 3 completions"),
        ("nothing", "returned NoneType, no list"),
        ("string", "returned str, no list"),
        ("dict", "returned dict, no list"),
        ("die", "the process that ran it ended"),
        ("abort", "the process that ran it ended"),
        ("sleep", f"time limit of {LIMIT} s"),
        ("regex", f"time limit of {LIMIT} s"),
    ],
)
def test_a_failing_batch_is_excluded_and_the_next_one_is_scored(shared, kind, reason):
    failed, start = shared.failed["my_rewards.act"], time.monotonic()
    totals, values = scored(shared, kind, "one", "one")
    assert time.monotonic() - start < LIMIT + 2
    assert totals == [None] * 3
    assert values == {"my_rewards.act": [None] * 3, "length": [0.0] * 3}
    assert (shared.failed["my_rewards.act"] - failed, shared.reasons["my_rewards.act"]) == (3, reason)
    assert scored(shared, "one")[0] == [2.0]


@pytest.mark.parametrize(("kind", "values"), [("shout", [2, 2, 2]), ("numpy", [0, 1, 2]), ("stdin", [0, 0, 0])])
def test_printing_arrays_and_standard_input(shared, kind, values):
    assert scored(shared, kind, kind, kind)[1]["my_rewards.act"] == values


def test_columns_are_lists_parallel_to_the_completions_and_never_replace_options(folder):
    rows = [
        {"prompt": "Q", "completion": "A", "do": "one", "extra": 10},
        {"prompt": "QQ", "completion": "A", "do": "one"},
    ]
    with rewards("my_rewards.columns_seen", "my_rewards.ids_and_extra") as made:
        values = made.score(["Q", "QQ"], ["a", "b"], [[1, 2], [3]], rows)[1]
    assert values == {"my_rewards.columns_seen": [1.0, 1.0], "my_rewards.ids_and_extra": [14.0, 5.0]}
    with rewards("length", "repetition", options={"length": {"limit": 2}}) as made:
        assert made.score(["Q"], ["a a a a"], [[1]], [{"limit": 9, "n": 9}])[0] == [-1.5]


def test_too_many_failures_stop_with_exit_code_8_and_without_content_of_private_rows(folder, monkeypatch):
    monkeypatch.setenv("FTCORE_PRIVATE", "1")
    with rewards("my_rewards.fails", share=0.5) as made, pytest.raises(RewardError) as error:
        made.score([SECRET], [SECRET], [[1]], [{"answer": SECRET}])
    assert error.value.exit_code == 8
    assert "'my_rewards.fails' gave no number for 1 of 1 completions" in str(error.value)
    assert "RuntimeError" in str(error.value)
    assert SECRET not in str(error.value)


def test_the_share_is_of_all_rows_seen_and_judged_from_sixteen_on(folder):
    with rewards("my_rewards.act", share=0.25) as made:
        scored(made, "one", "raise", "raise")  # 2 of 3
        scored(made, *["one"] * 10)  # 2 of 13
        scored(made, "raise", "raise", "one")  # 4 of 16: no larger share than a quarter
        with pytest.raises(RewardError, match="5 of 18 .* 0.25 .*KeyError"):
            scored(made, "one", "raise")
        assert (made.seen, made.failed) == (18, {"my_rewards.act": 5})


def test_a_whole_batch_that_fails_late_does_not_stop_the_run(folder):
    with rewards("my_rewards.act", share=0.25) as made:
        scored(made, *["one"] * 9)
        assert scored(made, "short", "one")[0] == [None, None]  # 2 of 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["length", "format"], "weights": [1.0]}, "2 rewards .2 different. and 1 weights"),
        ({"names": ["format", "format"], "weights": [1.0, 1.0]}, "2 rewards .1 different. and 2 weights"),
        ({"names": ["exact_match"], "options": {"length": {}}}, "Options for length, but the rewards are: exact_match"),
        ({"names": ["length"]}, "'length': .*missing 1 required keyword-only argument: 'limit'"),
        ({"names": ["length"], "options": {"length": {"limit": 0}}}, "limit must be above 0"),
        ({"names": ["length"], "options": {"length": {"limits": 3}}}, "no option limits; it has: limit"),
        ({"names": ["repetition"], "options": {"repetition": {"n": 2.5}}}, "n must be a whole number"),
        ({"names": ["format"], "options": {"format": {"pattern": "("}}}, "'format': .*unterminated"),
        ({"names": ["exact_mach"]}, "did you mean 'exact_match'"),
        ({"names": ["normalised"]}, "There is no reward 'normalised'"),
        ({"names": ["os.system"]}, r"trust=\[os\]"),
        ({"names": ["my_rewardsx.good"]}, r"trust=\[my_rewardsx\]"),
        ({"names": ["trl.rewards.x.y"]}, r"trust=\[trl\]"),
    ],
)
def test_wrong_settings_are_refused_at_once_and_nothing_is_imported(folder, arguments, message):
    names, weights = arguments["names"], arguments.get("weights", [1.0])
    with pytest.raises(ConfigError, match=message):
        rewards(*names, weights=weights, options=arguments.get("options"))
    assert not (folder / "imported").exists()
    assert "my_rewardsx" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewards.absent", "AttributeError: module 'my_rewards' has no attribute 'absent'"),
        ("my_rewards.absent.act", "ModuleNotFoundError"),
        ("my_rewards.ROW", "'my_rewards.ROW' is not a function"),
        ("leaves.act", "SystemExit: on import"),
    ],
)
def test_what_cannot_be_imported_is_a_config_error(folder, name, message):
    with pytest.raises(ConfigError, match=message):
        locate_reward(name, ["my_rewards", "leaves"])


def test_the_worker_reports_what_it_cannot_import_at_its_start(folder):
    message = "cannot be loaded: Reward 'my_rewards.absent' .*no attribute 'absent'"
    with rewards("repetition", "my_rewards.absent") as made, pytest.raises(ConfigError, match=message):
        scored(made, "one")


def test_trl_that_is_not_installed_is_said_so(monkeypatch):
    monkeypatch.setattr("ftcore.rewards.functions.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ftcore\[trl\]'"):
        check_reward("trl.rewards.think_format_reward", {}, [])


def test_functions_of_trl_and_tensors(folder):
    pytest.importorskip("trl")
    overlong = "trl.rewards.get_soft_overlong_punishment"
    names = ["trl.rewards.think_format_reward", overlong, "my_rewards.torch_values"]
    with rewards(*names, options={overlong: {"max_completion_len": 4, "soft_punish_cache": 2}}, limit=60) as made:
        texts = ["<think>\nhm\n</think>\nyes", "yes", "no"]
        totals, values = made.score(["Q"] * 3, texts, [[1], [1] * 3, [1] * 5], [{}] * 3)
    assert values == dict(zip(names, [[1.0, 0.0, 0.0], [0.0, -0.5, -1.0], [0.5, 0.25, None]], strict=True))
    assert totals == [1.5, -0.25, None]


def test_what_a_hanging_function_started_ends_with_it(folder, tmp_path):
    with rewards("my_rewards.grandchild", limit=0.8) as made:
        made.score(["Q"], ["a"], [[1]], [{"pid_file": str(tmp_path / "pid")}])
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a hanging function ends with its time limit only")
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_the_worker_ends_with_its_parent_and_says_nothing(folder, tmp_path, blow):
    pid_file, script = tmp_path / "pid", tmp_path / "script.py"
    script.write_text(f"""
from ftcore.rewards.worker import Rewards
if __name__ == "__main__":
    made = Rewards(["my_rewards.hang"], [1.0], {{}}, time_limit=60, max_failed_share=1.0, trust=["my_rewards"])
    try:
        made.score(["Q"], ["a"], [[1]], [{{"pid_file": {str(pid_file)!r}}}])
    except KeyboardInterrupt:
        print("interrupted")
""")
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{root}"}
    parent = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    assert soon(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
    os.killpg(parent.pid, blow)  # as Ctrl-C in a terminal does: the parent's whole group
    assert parent.communicate(timeout=10) == ("interrupted\n" if blow == signal.SIGINT else "", "")
    assert gone(int(pid_file.read_text()))


def soon(condition):
    """Whether a condition holds within ten seconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def gone(pid):
    """Whether a process ends soon; one that nobody has asked for its exit status counts as ended."""

    def ended():
        try:
            return subprocess.check_output(["ps", "-o", "stat=", "-p", str(pid)], text=True).startswith("Z")
        except subprocess.CalledProcessError:
            return True

    return soon(ended)


def test_a_run_that_teaches_nothing_says_so_once_with_the_reason(ftcore):
    words = [
        "method.rewards=[length]",
        "method.reward_options.length.limit=1000",
        "method.max_new_tokens=4",
        "max_steps=4",
    ]
    outcome = ftcore(*FAST, "method=grpo", *words, "evaluate.enabled=false")
    assert outcome.status == 0, outcome.err
    said = " ".join(outcome.out.split())
    assert said.count("No prompt taught anything in the first 3 steps") == 1 and "are all equal" in said


@pytest.mark.parametrize("private", [False, True])
def test_what_a_reward_raised_is_said_with_file_and_line(fails, tmp_path, monkeypatch, private):
    (tmp_path / "own_rewards.py").write_text(
        "def broken(completions, **_):\n    return [c['score'] for c in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = [
        "method=grpo",
        "method.rewards=[own_rewards.broken]",
        "trust=[own_rewards]",
        f"private={str(private).lower()}",
    ]
    message = fails(8, *FAST, *words, "max_steps=1", "evaluate.enabled=false")
    assert "TypeError at own_rewards.py:2" in message and ("string indices" in message) != private


def test_what_a_private_reward_starts_or_writes_is_not_shown(ftcore, tmp_path, monkeypatch, capfd):
    lines = ["import os, subprocess", "def loud(completions, **_):", "    os.write(1, b'SECRET')", "    os.write(2, b'SECRET')",
             "    subprocess.run(['echo', 'SECRET'])", "    return [float(k) for k, _ in enumerate(completions)]"]  # fmt: skip
    (tmp_path / "loud_rewards.py").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["method=grpo", "method.rewards=[loud_rewards.loud]", "trust=[loud_rewards]", "private=true"]
    outcome = ftcore(*FAST, *words, "max_steps=1", "evaluate.enabled=false")
    assert outcome.status == 0, outcome.err
    assert "SECRET" not in outcome.out + outcome.err + "".join(capfd.readouterr())


class WordlessError(Exception):
    def __str__(self):
        raise ValueError


def test_an_exception_that_cannot_be_shown_is_named():
    try:
        raise WordlessError
    except WordlessError as error:
        assert re.fullmatch(r"WordlessError at test_rewards.py:\d+", described(error))
