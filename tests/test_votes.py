"""Votes: the store keeps every one, none on a held-out question teaches, and they become rows of every method."""

import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from functools import cache

import numpy as np
import pytest

from ftcore.cli.command import run_command
from ftcore.data import feedback as store_module
from ftcore.data.feedback import Feedback, Pair
from ftcore.data.votes import read_votes, rows_of
from ftcore.errors import DataError
from ftcore.evaluate.preferences import agreement, counts, preferred
from ftcore.evaluate.win_rate import REACHED, capital, sides, win_rate
from ftcore.run_folder import Run
from tests.conftest import FAST, latest

# Win-rates.


@cache
def capitals():
    """The capital against 1/2 after so many wins and so many losses, up to 1,000 together; ties do not change it."""
    numbers = np.arange(1_001.0)
    table = np.full((1_001, 1_001), -np.inf)
    for w in range(1_001):
        losses = numbers[: 1_001 - w]
        table[w, : 1_001 - w] = capital(np.stack([np.full_like(losses, w), losses, np.zeros_like(losses)], 1), 0.5)
    return table


def decisions(rate, ties, most, raters=2_000, seed=0):
    """After how many votes each of simulated raters, who look after every one, sees a decision; most + 1: after none."""
    random = np.random.default_rng(seed)
    tie, won = random.random((raters, most)) < ties, random.random((raters, most)) < rate
    wins, losses = (won & ~tie).cumsum(1), (~won & ~tie).cumsum(1)
    decided = capitals()[wins, losses] >= REACHED
    return np.where(decided.any(1), decided.argmax(1) + 1, most + 1)


@pytest.mark.parametrize("ties", [0.0, 0.3])
def test_who_looks_after_every_vote_and_stops_when_he_likes_is_seldom_fooled(ties):
    false = (decisions(0.5, ties, 1_000) <= 1_000).mean()
    upper = false + 1.96 * np.sqrt(false * (1 - false) / 2_000)
    assert false > 0.005 and upper <= 0.06, (false, upper)


def test_a_preference_is_found_and_one_for_a_side_too():
    votes = decisions(0.7, 0.0, 200)
    assert np.median(votes) < 60 and (votes <= 200).mean() >= 0.95  # 44; a rater who takes the left side in 70 %
    assert (decisions(0.5, 0.0, 200) <= 200).mean() <= 0.05
    assert np.median(decisions(0.7, 0.3, 1_000)) < 90  # 66


def test_what_is_said_is_what_the_simulation_counts():
    draw = random.Random(1)
    for _ in range(8):
        votes = [draw.choices((1.0, 0.0, 0.5), (5, 2, 2))[0] for _ in range(120)]
        steps = [win_rate(votes[: n + 1])["verdict"] for n in range(len(votes))]
        first = next((n for n, verdict in enumerate(steps) if verdict != "not decided"), len(steps))
        assert set(steps[:first]) <= {"not decided"} and set(steps[first:]) <= {"better"}


def test_limits_hold_the_rate_and_close_in():
    few, many = win_rate([1.0, 0.5, 0.0] * 4), win_rate([1.0, 0.5, 0.0] * 400)
    assert 0 <= few["low"] < many["low"] < 0.5 < many["high"] < few["high"] <= 1
    turned = win_rate([0.0, 0.0, 1.0, 0.5])
    straight = win_rate([1.0, 1.0, 0.0, 0.5])
    assert turned["low"] == pytest.approx(1 - straight["high"], abs=1e-6)
    assert win_rate([])["rate"] is None and win_rate([1.0])["low"] < 0.5
    more = win_rate([1.0, 1.0, 0.0] * 5)["more"]
    assert win_rate([1.0, 1.0, 0.0] * (5 + more // 3 + 3))["verdict"] == "better"


def vote_of(prompt, left, right, choice, purpose="measure", rater="A", ids=(1, 2)):
    names = {"left_author": left, "right_author": right, "left_id": ids[0], "right_id": ids[1]}
    return {"prompt": prompt, "choice": choice, "purpose": purpose, "rater": rater, **names}


def test_one_vote_a_prompt_counts_whatever_the_side():
    votes = [vote_of(1, "a", "b", "left"), vote_of(1, "b", "a", "left"), vote_of(2, "b", "a", "right")]
    votes += [vote_of(3, "a", "b", "both_bad"), vote_of(4, "a", "c", "left"), vote_of(5, "a", "b", "left", "teach")]
    found = preferred(votes, "a", "b")
    assert (found["votes"], found["rate"]) == (3, pytest.approx(2.5 / 3))
    assert preferred(votes, "b", "a")["rate"] == pytest.approx(0.5 / 3)


def test_raters_agree_on_answers_not_on_sides():
    votes = [vote_of(1, "a", "b", "left"), vote_of(1, "b", "a", "right", rater="B", ids=(2, 1))]
    votes += [vote_of(2, "a", "b", "left", ids=(3, 4)), vote_of(2, "a", "b", "right", rater="B", ids=(3, 4))]
    assert agreement(votes) == {"pairs": 2, "agreed": 1}
    assert sides([True] * 30)["biased"] and not sides([True, False] * 50)["biased"]


# The store.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, in an output folder of its own."""
    folder = tmp_path_factory.mktemp("votes") / "runs"
    words = latest(*FAST, "evaluate.max_rows=12", "max_steps=2", f"output_dir={folder}", "name=a")
    assert run_command(words) == 0
    return Run.named(folder / "a")[0]


@pytest.fixture
def store(tmp_path, finished):
    """A store with that run's rows, and with two answers of somebody to each of eight prompts."""
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "x").symlink_to(finished.folder)
    made = Feedback(tmp_path / "runs")
    made.add_run(Run(tmp_path / "runs" / "a" / "x"))
    prompts = made.unanswered("m", 8, 2)
    made.add_answers("m", ((id, k, f"answer {id} {k}") for id, _ in prompts for k in (1, 2)))
    return made


def voted(store, choice, rater="A", text=None):
    pair, _ = store.next_pair(rater, "teach", "m", None if choice in ("good", "bad", "edit") else "m")
    return store.vote(rater, pair, choice, text), pair


HELD_OUT = "  what should I use to SEE if a bone is broken??"


def test_held_out_questions_measure_and_never_teach(store, finished):
    author = next(author for author in store.authors() if author.endswith("/base"))
    assert store.authors()[author]["measure"] > 0
    with pytest.raises(DataError, match="held out"):
        store.add_prompts([HELD_OUT])
    assert store.add_prompts(["Where is form 7 kept?", "where is form 7 kept"]) == 1
    held = sqlite3.connect(store.file).execute("SELECT COUNT(*) FROM held_out").fetchone()[0]
    assert held == 168
    with sqlite3.connect(store.file) as file:  # an answer to a held-out prompt
        id = file.execute("SELECT p.id FROM prompts p WHERE purpose = 'measure'").fetchone()[0]
    store.add_answers("n", [(id, 1, "x")])
    with sqlite3.connect(store.file) as file:
        answer = file.execute("SELECT id FROM answers WHERE author = 'n'").fetchone()[0]
    for choice, text in (("good", None), ("bad", None), ("edit", "y")):
        with pytest.raises(DataError, match="measure"):
            store.vote("A", Pair(id, answer, None), choice, text)


def test_a_question_that_has_come_to_be_held_out_teaches_no_more(store):
    pair, _ = store.next_pair("A", "teach", "m", "m")
    with sqlite3.connect(store.file) as file:
        file.execute("INSERT INTO held_out SELECT question FROM prompts WHERE id = ?", (pair.prompt,))
    with pytest.raises(DataError, match="come to be held out"):
        store.vote("A", pair, "left")
    assert not store.votes()


def test_a_vote_that_cannot_be_is_refused(store):
    pair, _ = store.next_pair("A", "teach", "m", "m")
    other, _ = store.next_pair("B", "teach", "m", None)
    wrong = [
        (" ", pair, "left", None), ("A", pair, "good", None), ("A", pair._replace(right=None), "tie", None),
        ("A", pair._replace(right=None), "edit", None), ("A" * 200_000, pair, "left", None),
        ("A", Pair(pair.prompt, pair.left, 10**6), "left", None), ("A", Pair(10**6, other.left, None), "good", None),
    ]  # fmt: skip
    for rater, about, choice, text in wrong:
        with pytest.raises(DataError):
            store.vote(rater, about, choice, text)
    assert not store.votes()


def test_undo_skip_and_a_key_that_is_pressed_twice(store):
    first, pair = voted(store, "left")
    assert store.vote("A", pair, "right") == first  # the same answers again
    assert store.vote("A", Pair(pair.prompt, pair.right, pair.left), "right") == first
    voted(store, "skip")
    assert [vote["id"] for vote in store.votes()] == [first] and store.next_pair("A", "teach", "m", "m")[1] == 6
    assert store.undo("A") and store.undo("A") and not store.undo("A") and not store.undo("B")
    assert not store.votes() and store.next_pair("A", "teach", "m", "m")[1] == 8


def test_sides_are_drawn_and_others_pairs_come_up_now_and_then(store):
    orders = {store.next_pair("A", "teach", "m", "m")[0].left for _ in range(40)}
    assert len(orders) == 2
    theirs = {voted(store, "left", "B")[1].prompt for _ in range(2)}
    mine = [voted(store, "left", "C")[1].prompt for _ in range(5)]
    assert not theirs & set(mine[:4]) and mine[4] in theirs


def test_the_file_is_its_owners_alone_and_holds_no_text_of_a_row(store, finished):
    store.add_prompts(["Where is form seven kept?"])
    assert store.file.stat().st_mode & 0o777 == 0o600
    content = b"".join(file.read_bytes() for file in store.folder.glob("feedback.db*"))
    prompts = [text for _, text in store.unanswered("nobody", 1_000, 1)]
    assert len(prompts) > 500 and b"Where is form seven kept?" in content
    assert not [text for text in prompts if text != "Where is form seven kept?" and text.encode() in content]


VOTER = """
import sys
from pathlib import Path
import ftcore.data.feedback as module
if sys.argv[2] == "network":
    module.is_local = lambda folder: False
store = module.Feedback(Path(sys.argv[1]))
for k in range(10_000):
    store.add_prompts([f"prompt {sys.argv[3]} {k}"])
    (id, _), = [one for one in store.unanswered("k", 10_000, 1) if one[1] == f"prompt {sys.argv[3]} {k}"]
    store.add_answers("k", [(id, 0, "answer")])
    pair, _ = store.next_pair(sys.argv[3], "teach", "k", None)
    print(store.vote(sys.argv[3], pair, "good"), flush=True)
"""


@pytest.mark.parametrize("disk", ["local", "network"])
def test_no_vote_that_was_shown_as_kept_is_lost_by_a_kill(tmp_path, disk):
    draw, said = random.Random(7), []
    for n in range(10):  # 20 in all
        command = [sys.executable, "-c", VOTER, str(tmp_path), disk, f"rater {n}"]
        voter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said.append(voter.stdout.readline().strip())
        time.sleep(draw.random() * 0.2)
        voter.send_signal(signal.SIGKILL)
        said += voter.communicate()[0].split()
    kept = {vote["id"] for vote in Feedback(tmp_path).votes()}
    assert len(said) >= 10 and set(said) <= kept


def test_over_a_network_the_journal_rolls_back(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "is_local", lambda folder: False)
    with Feedback(tmp_path)._open() as file:
        modes = [file.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert modes == ["delete", 2]


def test_votes_of_two_processes_at_once_are_all_kept(tmp_path):
    commands = [[sys.executable, "-c", VOTER, str(tmp_path), "local", name] for name in ("one", "two")]
    voters = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [voter.stdout.readline().strip() for voter in voters for _ in range(8)]
    for voter in voters:
        voter.kill()
        said += voter.communicate()[0].split()
    assert set(said) <= {vote["id"] for vote in Feedback(tmp_path).votes()}


# As rows.


def exported(*votes):
    """Votes as they are exported: (prompt, left, right, choice, text)."""
    names = ("prompt", "left", "right", "choice", "text")
    fixed = {"time": 0.0, "rater": "A", "purpose": "teach", "authors": ["m", "m"], "note": None}
    return [{**fixed, "id": str(k), **dict(zip(names, vote, strict=True))} for k, vote in enumerate(votes)]


SAID = exported(
    ("p", "a", "b", "left", None), ("q", "a", "b", "both_bad", None), ("r", "a", None, "edit", "c"),
    ("s", "a", None, "good", None),
    ("t", "a", "b", "tie", None), ("u", "a", None, "bad", None),
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("preference", [("p", "a", "b"), ("r", "c", "a")]),
        ("unpaired", [("p", "a", True), ("p", "b", False), ("q", "a", False), ("q", "b", False), ("r", "c", True),
                      ("r", "a", False), ("s", "a", True), ("u", "a", False)]),
        ("prompt_completion", [("r", "c"), ("s", "a")]),
    ],
)  # fmt: skip
def test_votes_become_rows_of_every_type(kind, expected):
    rows = [row for _, row in rows_of(SAID, kind, "votes")]
    assert [tuple(value for key, value in row.items() if key not in ("id", "group")) for row in rows] == expected
    assert not list(rows_of([{**vote, "purpose": "measure"} for vote in SAID], kind, "votes"))


def test_the_majority_counts_and_an_even_split_is_left_out():
    pair = ("p", "a", "b")
    assert not list(rows_of(exported((*pair, "left", None), (*pair, "right", None)), "preference", "v"))
    found = list(
        rows_of(exported((*pair, "left", None), (*pair, "right", None), (*pair, "right", None)), "preference", "v")
    )
    assert [(row["chosen"], row["rejected"]) for _, row in found] == [("b", "a")]


def test_an_export_is_the_votes_and_is_taken_in_once(store, tmp_path):
    for choice in ("left", "right", "tie"):
        voted(store, choice)
    voted(store, "edit", "B", "better")
    file = tmp_path / "votes.jsonl"
    file.write_text("".join(json.dumps(vote) + "\n" for vote in store.exported()))
    assert read_votes(file) == store.exported() == read_votes(store.file)
    other = Feedback(tmp_path / "other")
    assert (other.take_in(read_votes(file)), other.take_in(read_votes(file))) == (4, 0)
    shown = [
        {key: vote[key] for key in ("prompt", "left", "right", "choice", "text", "rater")} for vote in other.exported()
    ]
    assert shown == [{key: vote[key] for key in shown[0]} for vote in store.exported()]
    assert counts(other.votes()) == {"pairs": 2, "labels": 0, "corrections": 1, "measuring": 0}


def test_a_line_that_is_no_vote_is_named_without_its_text(rows, fails):
    path = rows(SAID[0], {"secret": "hush"})
    message = fails(3, *FAST, "method=dpo", "data=feedback", f"data.path={path}")
    assert "rows.jsonl:2" in message and "hush" not in message
    assert "no file" in fails(3, *FAST, "method=dpo", "data=feedback", "data.path=nowhere.jsonl")


@pytest.mark.parametrize("method", ["dpo", "kto", "sft"])
def test_every_kind_of_method_trains_on_votes(ftcore, rows, method):
    votes = exported(*((f"Where is form {k}?", f"a{k}", f"b{k}", "left", None) for k in range(8)))
    votes += exported(*((f"Where is key {k}?", f"a{k}", None, "edit", f"In box {k}.") for k in range(8)))
    path = rows(*({**vote, "id": str(k)} for k, vote in enumerate(votes)))
    outcome = ftcore(*FAST, f"method={method}", "data=feedback", f"data.path={path}", "max_steps=2")
    assert outcome.status == 0, outcome.err
    assert outcome.summary["votes"]["sha256"] and outcome.summary["data_rows"] >= 6


def test_answers_are_written_ahead_to_prompts_without_them(finished, capfd):
    folder = finished.folder.parents[1]
    for expected in (4, 8):
        assert run_command(["feedback", f"run={finished}", "answers=4", f"output_dir={folder}"]) == 0
        store = Feedback(folder)
        assert store.authors()[store.author(finished)]["teach"] == expected
    capfd.readouterr()
    assert run_command(["feedback", f"run={finished}", f"output_dir={folder}", "json=true"]) == 0
    assert json.loads(capfd.readouterr().out)["pairs"] == 0
    assert re.fullmatch(r"a/.*", store.author(finished))
