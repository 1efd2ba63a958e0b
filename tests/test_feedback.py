"""The store of votes: what was said is kept, what is held out never teaches, and votes become rows that a method trains on."""

import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import yaml

import ftcore.data.feedback as module
from ftcore.cli.command import run_command
from ftcore.data.feedback import EACH, LONGEST, Feedback, Pair, rows_of_run
from ftcore.data.votes import read_votes, rows_of
from ftcore.errors import DataError
from ftcore.evaluate.preferences import counts
from ftcore.run_folder import Run
from tests.conftest import FAST, latest

MODEL = "someone"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two steps with answers to 12 held-out rows."""
    folder = tmp_path_factory.mktemp("feedback") / "runs"
    words = latest(*FAST, "evaluate.max_rows=12", "max_steps=2", f"output_dir={folder}", "name=first")
    assert run_command(words) == 0
    return Run.named(folder / "first")[0]


@pytest.fixture
def run(tmp_path, finished):
    """That run, in an output folder of this test's; what its models wrote is not the same."""
    copy = Run(shutil.copytree(finished.folder, tmp_path / "runs" / "first" / "x", symlinks=True))
    samples = [sample | {side: f"{side} {k}" for side in ("base", "tuned")} for k, sample in enumerate(copy.samples())]
    write(copy.folder / "samples.jsonl", samples)
    return copy


@pytest.fixture
def store(tmp_path, run):
    """A store that has taken in the run."""
    made = Feedback(tmp_path / "runs")
    made.add_run(run)
    return made


@pytest.fixture
def typed(tmp_path):
    """A store of 12 typed prompts with two answers of a model to each."""
    made = Feedback(tmp_path / "typed")
    made.add_prompts(f"Where is form {k}?" for k in range(12))
    answer(made, 12)
    return made


def answer(store, count, author=MODEL):
    texts = {k: f"{author} answers {k}" for k in (1, 2)}
    prompts = store.unanswered(author, count, 2)
    store.add_answers(author, ((id, k, f"{text} to {prompt}") for id, prompt in prompts for k, text in texts.items()))


def pair(store, rater="Ann", purpose="teach", first=MODEL, second=MODEL):
    return store.next_pair(rater, purpose, first, second)[0]


def one(store, rater="Ann"):
    return pair(store, rater, second=None)


def say(store, choice="left", rater="Ann", text=None):
    """Vote on the next pair, or on one answer; returns the prompt."""
    about = (one if choice in ("good", "bad", "edit") else pair)(store, rater)
    store.vote(rater, about, choice, text)
    return about.prompt


def ids(store):
    return [vote["id"] for vote in store.votes()]


def prompts(store):
    """(id, purpose, key of the question) of all prompts in the file."""
    with sqlite3.connect(store.file) as file:
        return file.execute("SELECT id, purpose, question FROM prompts ORDER BY id").fetchall()


def run_with(run, folder, **data):
    """A run as `run` but for its data."""
    folder.mkdir(parents=True)
    config = yaml.safe_load(run.config_file.read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"data": config["data"] | {"records": {}} | data}))
    return Run(folder)


def hold_out(store, run, rows, *questions):
    """Take in another run, by which these questions are held out."""
    test = rows(*({"prompt": question, "completion": "Here."} for question in questions), name="test.jsonl")
    train = rows({"prompt": "Of the other run.", "completion": "Here."}, name="train.jsonl")
    splits = {"train": train, "validation": None, "test": test}
    store.add_run(run_with(run, store.folder / "other" / "y", splits=splits))


# Runs and prompts.


def test_rows_of_a_run_teach_and_measure_as_they_trained_and_were_held_out(store, run):
    train, held_out = rows_of_run(run)
    assert Counter(purpose for _, purpose, _ in prompts(store)) == {"teach": len(train), "measure": len(held_out)}
    name = store.author(run)
    assert name == "first/x" and store.authors() == {name: {"measure": 12}, f"{name}/base": {"measure": 12}}
    assert {text for _, text in store.unanswered(MODEL, 10_000, 1)} == {row["prompt"] for row in train}
    shown = store.texts(pair(store, purpose="measure", first=name, second=f"{name}/base"))
    sample = next(sample for sample in run.samples() if sample["prompt"] == shown.prompt)
    assert {shown.left, shown.right} == {sample["base"], sample["tuned"]}
    assert (shown.purpose, shown.run) == ("measure", name)


def test_a_run_that_is_taken_in_again_changes_nothing(store, run):
    before = prompts(store), store.authors()
    store.add_run(run)
    assert (prompts(store), store.authors()) == before


def test_a_run_of_texts_has_nothing_to_vote_on(tmp_path, run, rows):
    path = rows(*({"text": f"Form {k} is in box {k}."} for k in range(20)))
    store = Feedback(tmp_path / "runs")
    config = yaml.safe_load(run.config_file.read_text())
    texts = run_with(run, store.folder / "texts" / "x", path=path)
    method = config["method"] | {"_target_": "ftcore.methods.self_supervised.SelfSupervised"}
    texts.config_file.write_text(yaml.safe_dump(texts.config | {"method": method}))
    store.add_run(Run(texts.folder))
    assert not prompts(store) and not store.authors()


SPELT = [
    "What should I use to see if a bone is broken?",
    "  WHAT should I use, to SEE... if (a) bone is broken!!",
    "what  should\ni use to see if a bone is broken",
    "\uff37hat should I use to see if a bone is broken?",
]


@pytest.mark.parametrize("question", SPELT)
def test_a_question_that_is_held_out_is_not_taken_however_it_is_spelt(store, question):
    before = prompts(store)
    with pytest.raises(DataError, match="held out"):
        store.add_prompts(["Where is form 7 kept?", question])
    assert prompts(store) == before
    with pytest.raises(DataError, match="held out"):
        store.take_in(votes_of((question, "a", "b", "left", None)))
    assert prompts(store) == before and not store.votes()


def test_a_prompt_is_taken_once_however_it_is_spelt(store):
    assert store.add_prompts(["Where is form 7?", "where is FORM 7", "Where is form 8?"]) == 2
    assert store.add_prompts(["Where is form seven?", "where, is form 8"]) == 1
    texts = [text for _, text in store.unanswered(MODEL, 3, 1)]  # typed ones come first
    assert sorted(texts) == ["Where is form 7?", "Where is form 8?", "Where is form seven?"]


def test_prompts_that_are_answered_are_not_answered_again(typed):
    assert not typed.unanswered(MODEL, 12, 2) and len(typed.unanswered(MODEL, 12, 3)) == 12
    assert len(typed.unanswered("another", 12, 1)) == 12 and len(typed.unanswered("another", 5, 1)) == 5
    voted = say(typed)
    assert typed.unanswered("another", 12, 1)[-1][0] == voted  # what nobody has voted on comes first


@pytest.mark.parametrize(("choice", "text"), [("good", None), ("bad", None), ("edit", "An X-ray.")])
def test_one_answer_to_a_held_out_prompt_is_neither_called_good_nor_corrected(store, run, choice, text):
    about = pair(store, purpose="measure", first=store.author(run), second=None)
    with pytest.raises(DataError, match="measure"):
        store.vote("Ann", about, choice, text)
    assert not ids(store)


def test_votes_on_a_question_that_is_held_out_since_are_refused(store, run, rows):
    answer(store, 3)
    about = pair(store)
    hold_out(store, run, rows, store.texts(about).prompt.upper() + "!!")
    for choice in ("left", "tie", "both_bad"):
        with pytest.raises(DataError, match="come to be held out"):
            store.vote("Ann", about, choice)
    with pytest.raises(DataError, match="come to be held out"):
        store.vote("Ann", about._replace(right=None), "edit", "Better.")
    assert not ids(store)


def test_a_question_that_is_held_out_since_is_not_shown(store, run, rows):
    answer(store, 3)
    about = pair(store)
    hold_out(store, run, rows, store.texts(about).prompt)
    shown, left = store.next_pair("Ann", "teach", MODEL, MODEL)
    assert left == 2 and shown.prompt != about.prompt
    assert about.prompt not in {id for id, _ in store.unanswered("another", 10_000, 1)}


def test_a_vote_on_a_question_that_is_held_out_since_does_not_teach(store, run, rows):
    answer(store, 3)
    store.vote("Ann", about := pair(store), "left")
    hold_out(store, run, rows, store.texts(about).prompt)
    assert not list(rows_of(store.exported(), "preference", "votes"))


def test_a_held_out_question_after_a_system_message_is_not_taken(tmp_path, run, rows):
    def row(k):
        said = {"system": "Be brief.", "user": f"What is number {k}?", "assistant": f"It is {k}."}
        return {"messages": [{"role": role, "content": text} for role, text in said.items()]}

    store = Feedback(tmp_path / "runs")
    chats = run_with(run, store.folder / "chats" / "x", path=rows(*map(row, range(40))))
    store.add_run(chats)
    with pytest.raises(DataError, match="held out"):
        store.add_prompts([rows_of_run(chats)[1][0]["prompt"]])


def test_prompts_of_a_run_that_is_gone_are_those_of_the_next_run_on_the_same_rows(store, run, finished):
    shutil.rmtree(run.folder)
    (store.folder / "second").mkdir()
    shutil.copytree(finished.folder, store.folder / "second" / "y", symlinks=True)
    store.add_run(Run(store.folder / "second" / "y"))
    assert len(store.unanswered(MODEL, 4, 2)) == 4


def test_a_prompt_without_a_word_is_refused(typed):
    with pytest.raises(DataError):
        typed.add_prompts([""])


# Votes.


@pytest.mark.parametrize(
    ("rater", "choice", "text", "note"),
    [(" ", "left", None, None), ("", "left", None, None), ("a" * (LONGEST + 1), "left", None, None),
     ("Ann", "left", None, "n" * (LONGEST + 1)), ("Ann", "good", None, None), ("Ann", "edit", "Better.", None)],
)  # fmt: skip
def test_a_vote_on_two_answers_that_cannot_be_is_refused(typed, rater, choice, text, note):
    with pytest.raises(DataError):
        typed.vote(rater, pair(typed), choice, text, note)
    assert not ids(typed)


@pytest.mark.parametrize(
    ("choice", "text"),
    [("left", None), ("right", None), ("tie", None), ("both_bad", None), ("edit", None), ("edit", ""), ("good", "Better."),
     ("edit", "t" * (LONGEST + 1))],
)  # fmt: skip
def test_a_vote_on_one_answer_that_cannot_be_is_refused(typed, choice, text):
    with pytest.raises(DataError):
        typed.vote("Ann", one(typed), choice, text)
    assert not ids(typed)


def test_a_text_as_long_as_is_allowed_is_kept(typed):
    typed.vote("Ann", one(typed), "edit", "t" * LONGEST, "n" * LONGEST)
    assert [(len(vote["text"]), len(vote["note"])) for vote in typed.votes()] == [(LONGEST, LONGEST)]
    with pytest.raises(DataError):
        typed.add_prompts(["p" * (LONGEST + 1)])


def test_answers_to_two_prompts_are_no_pair(typed):
    first = pair(typed)
    typed.vote("Ann", first, "tie")
    second = pair(typed)
    assert second.prompt != first.prompt
    wrong = [Pair(first.prompt, first.left, second.right), Pair(second.prompt, first.left, first.right)]
    wrong += [Pair(10**6, first.left, first.right), Pair(first.prompt, 10**6, None), first._replace(right=10**6)]
    for about in wrong:
        with pytest.raises(DataError, match="not two of one prompt"):
            typed.vote("Bob", about, "left")
    assert len(ids(typed)) == 1


def test_an_answer_and_itself_are_no_pair(typed):
    about = pair(typed)
    with pytest.raises(DataError):
        typed.vote("Ann", about._replace(right=about.left), "left")


def test_an_unknown_choice_is_refused(typed):
    with pytest.raises(DataError):
        typed.vote("Ann", pair(typed), "perhaps")


def test_a_number_that_no_file_holds_is_refused(typed):
    with pytest.raises(DataError):
        typed.vote("Ann", Pair(10**30, 1, 2), "left")


def test_every_choice_is_kept_as_it_was_given(typed):
    said = [(choice, None) for choice in ("left", "right", "tie", "both_bad", "good", "bad")] + [("edit", "Better.")]
    for choice, text in said:
        typed.vote(
            " Ann ", one(typed) if choice in ("good", "bad", "edit") else pair(typed), choice, text, f"why {choice}"
        )
    found = [(vote["rater"], vote["choice"], vote["text"], vote["note"]) for vote in typed.votes()]
    assert found == [("Ann", choice, text, f"why {choice}") for choice, text in said]


def test_the_same_vote_twice_is_one_vote(typed):
    about = pair(typed)
    id = typed.vote("Ann", about, "left")
    assert (
        typed.vote("Ann", about, "left")
        == typed.vote("Ann", Pair(about.prompt, about.right, about.left), "right")
        == id
    )
    assert typed.vote("Bob", about, "left") != id and len(ids(typed)) == 2
    assert pair(typed) != about


def test_the_same_vote_twice_at_once_is_one_vote(typed):
    about = pair(typed)
    for k in range(10):
        start = threading.Barrier(2)
        clicks = [
            threading.Thread(target=lambda k=k, start=start: (start.wait(), typed.vote(f"rater {k}", about, "left")))
            for _ in range(2)
        ]
        for click in clicks:
            click.start()
        for click in clicks:
            click.join()
    assert len(ids(typed)) == 10


def test_votes_are_taken_back_the_last_one_first(typed):
    first, second = (typed.vote("Ann", pair(typed), "left") for _ in range(2))
    third = typed.vote("Bob", pair(typed, "Bob"), "left")
    assert typed.undo("Ann") and ids(typed) == [first, third]
    assert typed.undo("Ann") and not typed.undo("Ann") and not typed.undo("Cem") and ids(typed) == [third]
    again = typed.vote("Ann", pair(typed), "right")
    assert again not in (first, second) and ids(typed) == [third, again]


def test_a_vote_is_taken_back_by_the_name_that_it_was_given_with(typed):
    typed.vote("Ann ", pair(typed), "left")
    assert typed.undo("Ann ")


def test_what_is_skipped_is_not_shown_again_and_does_not_count(typed):
    about = pair(typed)
    typed.vote("Ann", about, "skip")
    assert not typed.votes() and not typed.exported()
    seen = set()
    while found := typed.next_pair("Ann", "teach", MODEL, MODEL):
        seen.add(found[0].prompt)
        assert found[1] == 12 - len(seen)
        typed.vote("Ann", found[0], "tie")
    assert len(seen) == 11 and about.prompt not in seen and typed.next_pair("Bob", "teach", MODEL, MODEL)[1] == 12


def test_who_goes_back_to_what_he_skipped_can_vote_on_it(typed):
    about = pair(typed)
    typed.vote("Ann", about, "skip")
    assert typed.vote("Ann", about, "left") in ids(typed)


def test_sides_are_drawn_by_chance(typed):
    drawn = Counter(pair(typed).left for _ in range(400))
    assert len(drawn) == 2 and min(drawn.values()) > 50  # less in one of 10^12


def test_authors_are_on_both_sides_and_equal_answers_are_not_shown(typed):
    with sqlite3.connect(typed.file) as file:
        same = dict(file.execute("SELECT prompt, text FROM answers WHERE sample = 1").fetchall())
    typed.add_answers("rival", ((id, 1, text if id == 1 else f"another to {id}") for id, text in same.items()))
    shown = [typed.next_pair("Ann", "teach", MODEL, "rival") for _ in range(60)]
    assert {count for _, count in shown} == {11}
    assert {typed.texts(about).left.startswith("another") for about, _ in shown} == {True, False}
    assert typed.next_pair("Ann", "measure", MODEL, "rival") is None


def test_every_fifth_pair_is_one_that_others_have_voted_on(typed):
    theirs = {say(typed, rater="Bob") for _ in range(3)}
    mine = [say(typed) for _ in range(2 * EACH)]
    assert [n for n, prompt in enumerate(mine, 1) if prompt in theirs] == [EACH, 2 * EACH]


def test_a_pair_that_others_have_skipped_is_not_one_that_they_have_voted_on(typed):
    say(typed, "skip", "Bob")
    voted = say(typed, "left", "Bob")
    assert [say(typed) for _ in range(EACH)][-1] == voted


# The file.


def test_the_file_is_its_owners_alone_also_while_it_is_written(tmp_path):
    store = Feedback(tmp_path / "new")
    with store._open() as file:
        file.execute("INSERT INTO held_out VALUES ('x')")
        modes = {one.name: one.stat().st_mode & 0o777 for one in store.folder.iterdir()}
    assert store.file.name in modes and set(modes.values()) == {0o600}
    assert store.file.stat().st_mode & 0o777 == 0o600


def test_no_text_of_a_row_is_in_the_file(store, run):
    store.add_prompts(["Where is form seven kept?"])
    store.add_answers(MODEL, ((id, k, f"answer {k}") for id, _ in store.unanswered(MODEL, 8, 2) for k in (1, 2)))
    say(store), say(store, "edit", "Bob", "Better.")
    store.vote(
        "Ann", pair(store, purpose="measure", first=store.author(run), second=f"{store.author(run)}/base"), "left"
    )
    raw = b"".join(file.read_bytes() for file in store.folder.glob("feedback.db*"))
    train, held_out = rows_of_run(run)
    assert len(train) == 504 and len(held_out) == 168 and b"Where is form seven kept?" in raw
    assert not [row["prompt"] for row in (*train, *held_out) if row["prompt"].encode() in raw]


def test_a_file_that_is_no_store_is_an_error(tmp_path, fails):
    (tmp_path / "feedback.db").write_text("not a database, but long enough to be read as one\n" * 100)
    with pytest.raises(DataError, match="cannot be used"):
        Feedback(tmp_path).votes()
    assert "cannot be used" in fails(3, "feedback", f"output_dir={tmp_path}")


VOTER = """
import sys
from pathlib import Path
import ftcore.data.feedback as module
folder, disk, rater, count = sys.argv[1:]
if disk == "network":
    module.is_local = lambda folder: False
store = module.Feedback(Path(folder))
store.add_prompts(f"Prompt {k}" for k in range(400))
store.add_answers("m", ((id, k, f"answer {k}") for id, _ in store.unanswered("m", 400, 2) for k in (1, 2)))
for _ in range(int(count)):
    print(store.vote(rater, store.next_pair(rater, "teach", "m", "m")[0], "left"), flush=True)
"""


def voter(folder, disk, rater, count=400):
    command = [sys.executable, "-c", VOTER, str(folder), disk, rater, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(("disk", "mode"), [("local", "wal"), ("network", "delete")])
def test_no_vote_that_was_said_to_be_kept_is_lost_by_a_kill(tmp_path, disk, mode):
    draw, said, codes = random.Random(11), [], []
    assert voter(tmp_path, disk, "first", 0).wait() == 0
    for n in range(0, 20, 2):
        children = [voter(tmp_path, disk, f"rater {k}") for k in (n, n + 1)]
        for child in children:
            said.append(child.stdout.readline().strip())
            time.sleep(draw.random() * 0.03)
            child.send_signal(signal.SIGKILL)
            said += child.stdout.read().split()
            codes.append(child.wait())
    assert codes == [-signal.SIGKILL] * 20 and len(said) > 20 and all(len(id) == 16 for id in said)
    with sqlite3.connect(tmp_path / "feedback.db") as file:
        assert file.execute("PRAGMA journal_mode").fetchone() == (mode,)
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        kept = {id for (id,) in file.execute("SELECT id FROM votes")}
    assert set(said) <= kept and len(kept) <= len(said) + 20  # at most one was written and not said, each time
    assert (tmp_path / "feedback.db").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("local", "mode"), [(True, "wal"), (False, "delete")])
def test_what_is_written_is_on_the_disk_when_it_is_said_to_be(tmp_path, monkeypatch, local, mode):
    monkeypatch.setattr(module, "is_local", lambda folder: local)
    with Feedback(tmp_path)._open() as file:
        found = [file.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert found == [mode, 2]


@pytest.mark.parametrize(("kind", "local"), [("ext4", True), ("nfs4", False), ("fuse.sshfs", False), ("XFS", True)])
def test_a_disk_is_known_by_the_nearest_mount(tmp_path, monkeypatch, kind, local):
    (tmp_path / "mount").mkdir()
    mounts = {tmp_path / "mount": kind, tmp_path: "9p", tmp_path / "mount" / "deeper": "btrfs"}
    parts = [SimpleNamespace(mountpoint=str(place), fstype=name) for place, name in mounts.items()]
    monkeypatch.setattr(module.psutil, "disk_partitions", lambda all: parts)
    assert module.is_local(tmp_path / "mount" / "runs") is local
    assert not module.is_local(tmp_path) and module.is_local(tmp_path / "mount" / "deeper" / "runs")


@pytest.mark.parametrize("disk", ["local", "network"])
def test_processes_that_vote_at_once_lose_nothing(tmp_path, disk):
    assert voter(tmp_path, disk, "first", 1).wait() == 0
    voters = [voter(tmp_path, disk, rater, 60) for rater in ("Ann", "Bob")]
    said = [child.communicate()[0] for child in voters]
    assert [child.returncode for child in voters] == [0, 0], said
    written = [id for out in said for id in out.split()]
    assert len(written) == 120 and set(written) < set(ids(Feedback(tmp_path))) and len(ids(Feedback(tmp_path))) == 121


def test_who_comes_second_to_a_new_file_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "is_local", lambda folder: True)
    store = Feedback(tmp_path)
    first = sqlite3.connect(store.file, isolation_level=None, check_same_thread=False)
    first.execute("BEGIN IMMEDIATE")
    first.execute("CREATE TABLE t (x)")
    release = threading.Timer(0.3, first.commit)
    release.start()
    try:
        assert store.add_prompts(["Where is form 7?"]) == 1
    finally:
        release.join()
        first.close()


# Rows.


def votes_of(*said, **more):
    """Votes as they are exported, each of (prompt, left, right, choice, text)."""
    names, fixed = ("prompt", "left", "right", "choice", "text"), {"time": 0.0, "purpose": "teach", "note": None}
    return [
        {**fixed, "id": f"{k:016x}", "rater": f"rater {k}", "authors": ["m", "m"][: 1 + (vote[2] is not None)]}
        | dict(zip(names, vote, strict=True))
        | more
        for k, vote in enumerate(said)
    ]


def rows_from(kind, votes):
    columns = {"preference": ("chosen", "rejected"), "unpaired": ("completion", "label")}.get(kind, ("completion",))
    return {(row["prompt"], *(row[name] for name in columns)) for _, row in rows_of(votes, kind, "votes")}


SAID = [
    ("left", "a", "b", "left", None), ("right", "a", "b", "right", None), ("tie", "a", "b", "tie", None),
    ("bad", "a", "b", "both_bad", None), ("edit", "a", None, "edit", "c"), ("good", "a", None, "good", None),
    ("poor", "a", None, "bad", None),
]  # fmt: skip
ROWS = {
    "preference": {("left", "a", "b"), ("right", "b", "a"), ("edit", "c", "a")},
    "unpaired": {("left", "a", True), ("left", "b", False), ("right", "b", True), ("right", "a", False), ("bad", "a", False),
                 ("bad", "b", False), ("edit", "c", True), ("edit", "a", False), ("good", "a", True), ("poor", "a", False)},
    "prompt_completion": {("edit", "c"), ("good", "a")},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_votes_become_the_rows_that_a_method_reads(kind):
    votes = votes_of(*SAID)
    assert rows_from(kind, votes) == ROWS[kind] == rows_from(kind, votes + votes_of(*SAID))
    assert len(list(rows_of(votes, kind, "votes"))) == len(ROWS[kind])


@pytest.mark.parametrize("kind", [*ROWS, "prompt"])
def test_votes_that_measure_become_no_rows(kind):
    assert not list(rows_of(votes_of(*SAID, purpose="measure"), kind, "votes"))


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ("ab", set()),
        ("aab", {("p", "a", "b")}),
        ("abb", {("p", "b", "a")}),
        ("aabb", set()),
        ("abbab", {("p", "b", "a")}),
    ],
)
def test_where_raters_contradict_each_other_the_majority_counts(sides, expected):
    straight, turned = ("p", "a", "b"), ("p", "b", "a")  # the sides are drawn anew for each rater
    votes = votes_of(
        *(
            (*(straight if k % 2 else turned), "left" if (side == "a") == bool(k % 2) else "right", None)
            for k, side in enumerate(sides)
        )
    )
    assert rows_from("preference", votes) == expected
    labels = {("p", text, label) for _, good, bad in expected for text, label in ((good, True), (bad, False))}
    assert rows_from("unpaired", votes) == labels
    single = votes_of(*(("p", "a", None, "good" if side == "a" else "bad", None) for side in sides))
    assert rows_from("prompt_completion", single) == {("p", "a") for _, good, _ in expected if good == "a"}


def test_no_answer_is_called_both_good_and_bad():
    votes = votes_of(("p", "a", "b", "left", None), ("p", "a", "b", "both_bad", None))
    assert not {("p", "a", True), ("p", "a", False)} <= rows_from("unpaired", votes)


def test_a_correction_that_corrects_nothing_says_that_the_answer_is_good():
    votes = votes_of(("p", "a", None, "edit", "a"))
    assert not rows_from("preference", votes) and rows_from("prompt_completion", votes) == {("p", "a")}


# Exports.


def write(file, votes):
    file.write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    return file


def without_names(votes):
    return [{key: value for key, value in vote.items() if key != "authors"} for vote in votes]


@pytest.fixture
def voted(store, run):
    """A store with votes of every kind."""
    answer(store, 8)
    name = store.author(run)
    store.vote("Ann", pair(store, purpose="measure", first=name, second=f"{name}/base"), "right", note="shorter")
    for choice in ("left", "right", "tie", "both_bad"):
        store.vote("Ann", pair(store), choice)
    for choice, text in (("good", None), ("bad", None), ("edit", "An X-ray — «quickly».\n")):
        store.vote("Bob", one(store, "Bob"), choice, text)
    return store


def test_an_export_is_read_as_the_votes_that_are_in_the_store(voted, tmp_path, ftcore):
    file = tmp_path / "votes.jsonl"
    assert ftcore("feedback", f"output_dir={voted.folder}", f"to={file}").status == 0
    assert read_votes(file) == voted.exported() == read_votes(voted.file) and len(voted.exported()) == 8
    assert [vote["id"] for vote in voted.exported()] == ids(voted)


def test_an_export_is_taken_in_elsewhere_once(voted, tmp_path):
    file = write(tmp_path / "votes.jsonl", voted.exported())
    other = Feedback(tmp_path / "other")
    assert [other.take_in(read_votes(file)) for _ in range(3)] == [8, 0, 0]
    assert other.exported() == voted.exported() and counts(other.votes()) == counts(voted.votes())
    for kind in ROWS:
        assert rows_from(kind, other.exported()) == rows_from(kind, voted.exported()) != set()
    assert voted.take_in(other.exported()) == 0


def test_a_vote_that_was_taken_back_does_not_come_back_with_an_export(voted, tmp_path):
    exported = voted.exported()
    voted.undo("Bob")
    assert voted.take_in(exported) == 0 and len(ids(voted)) == 7


def test_a_vote_that_measures_does_not_teach_where_its_prompt_was_typed(typed):
    votes = votes_of(("Where is FORM 3?", "a", "b", "left", None), purpose="measure")
    typed.take_in(votes)
    assert not rows_from("preference", typed.exported())


@pytest.mark.parametrize("line", ['{"secret": "hush"}', '{"secret": "hush', '["hush"]', '"hush"'])
def test_a_line_that_is_no_vote_is_named_without_what_it_holds(tmp_path, fails, line):
    file = write(tmp_path / "votes.jsonl", votes_of(*SAID))
    file.write_text(file.read_text() + line + "\n")
    for words in ([*FAST, "method=dpo", "data=feedback", f"data.path={file}"], ["feedback", f"from={file}"]):
        message = fails(3, *words)
        assert f"votes.jsonl:{len(SAID) + 1}" in message and "hush" not in message
    assert not (tmp_path / "runs" / "feedback.db").exists()


def test_a_choice_that_is_none_is_not_quoted(tmp_path, fails):
    file = write(tmp_path / "votes.jsonl", votes_of(("p", "a", "b", "hush", None)))
    message = fails(3, "feedback", f"from={file}")
    assert "votes.jsonl:1" in message and "hush" not in message


@pytest.mark.parametrize(
    "change",
    [{"prompt": 5}, {"prompt": ""}, {"prompt": None}, {"left": None}, {"left": ["a"]}, {"right": None}, {"authors": ["m"]},
     {"authors": None}, {"purpose": "other"}, {"time": "today"}, {"rater": None}, {"rater": " "}, {"id": None},
     {"choice": "edit"}, {"text": "t" * (LONGEST + 1)}],
    ids=lambda change: "-".join(f"{key}={str(value)[:5]}" for key, value in change.items()),
)  # fmt: skip
def test_a_vote_whose_values_cannot_be_is_refused(tmp_path, change):
    (vote,) = votes_of(("p", "a", "b", "left", None))
    file = write(tmp_path / "votes.jsonl", [vote | change])
    with pytest.raises(DataError, match="votes.jsonl:1"):
        read_votes(file)


def test_a_file_that_is_missing_is_an_error(tmp_path, fails):
    with pytest.raises(DataError, match="no file"):
        read_votes(tmp_path / "nowhere.jsonl")
    for name in ("nowhere.jsonl", "nowhere.db"):
        assert "no file" in fails(3, *FAST, "method=dpo", "data=feedback", f"data.path={name}")
    assert "no file" in fails(3, "feedback", "from=nowhere.jsonl")


def test_a_store_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(DataError):
        read_votes(tmp_path / "nowhere.db")


def test_a_store_of_another_name_is_read(typed):
    typed.vote("Ann", pair(typed), "left")
    copy = typed.folder / "backup.db"
    shutil.copy(typed.file, copy)
    expected = typed.exported()
    typed.vote("Ann", pair(typed), "left")
    assert read_votes(copy) == expected


# The verb, and training.


def asked(ftcore, *words):
    outcome = ftcore("feedback", "json=true", *words)
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)


def test_votes_are_counted(voted, ftcore):
    found = asked(ftcore, f"output_dir={voted.folder}")
    assert {key: found[key] for key in ("pairs", "labels", "corrections", "measuring")} == {
        "pairs": 2, "labels": 3, "corrections": 1, "measuring": 1,
    }  # fmt: skip
    assert found["store"] == str(voted.file) and found["agreement"] == {"pairs": 0, "agreed": 0}
    assert {rater: took["votes"] for rater, took in found["raters"].items()} == {"Ann": 3, "Bob": 0}
    (wins,) = found["wins"]
    assert (wins["first"], wins["second"], wins["votes"]) == ("first/x", "first/x/base", 1)


def test_an_empty_store_has_no_votes(ftcore):
    found = asked(ftcore)
    assert (found["pairs"], found["measuring"], found["raters"], found["wins"]) == (0, 0, {}, [])


def test_votes_and_prompts_are_taken_in_by_the_verb(voted, tmp_path, ftcore, rows, fails):
    file = write(tmp_path / "votes.jsonl", voted.exported())
    prompts_file = rows({"prompt": "Where is form 7?"}, {"prompt": "where is form 7"}, {"prompt": "And form 8?"})
    words = [f"from={file}", f"prompts={prompts_file}", f"output_dir={tmp_path / 'other'}"]
    found = asked(ftcore, *words)
    assert (found["taken_in"], found["prompts"], found["pairs"]) == (8, 2, 2)
    again = asked(ftcore, *words)
    assert (again["taken_in"], again["prompts"], again["pairs"]) == (0, 0, 2)
    held_out = rows({"prompt": "And form 9?"}, {"prompt": SPELT[1]}, name="held_out.jsonl")
    assert "held out" in fails(3, "feedback", f"prompts={held_out}", f"output_dir={voted.folder}")


def test_held_out_rows_are_written_beside_the_votes(voted, run, tmp_path, ftcore):
    to = tmp_path / "export" / "votes.jsonl"
    found = asked(ftcore, f"run={run.folder}", f"output_dir={voted.folder}", "method=sft", f"to={to}")
    held_out = [json.loads(line) for line in (to.parent / "held_out.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in held_out} == {row["prompt"] for row in rows_of_run(run)[1]}
    assert found["votes"] == 8 and found["held_out"] == str(to.parent / "held_out.jsonl")


def test_a_model_writes_two_answers_to_each_prompt_and_to_others_the_next_time(finished, ftcore, tmp_path):
    folder = tmp_path / "runs"
    shutil.copytree(finished.folder, folder / "first" / "x", symlinks=True)
    store, seen = Feedback(folder), []
    for _ in range(2):
        assert asked(ftcore, f"run={folder / 'first' / 'x'}", "answers=4", f"output_dir={folder}")["answers"] == 4
        with sqlite3.connect(store.file) as file:
            query = "SELECT prompt, sample FROM answers JOIN prompts p ON p.id = prompt WHERE purpose = 'teach'"
            seen.append(file.execute(query).fetchall())
    assert Counter(sample for _, sample in seen[0]) == {1: 4, 2: 4} and len({prompt for prompt, _ in seen[0]}) == 4
    assert len(seen[1]) == 16 and len({prompt for prompt, _ in seen[1]}) == 8 and set(seen[0]) < set(seen[1])


def test_answers_need_a_run(fails):
    assert "run=" in fails(2, "feedback", "answers=4")


@pytest.mark.parametrize(("method", "rows_expected"), [("dpo", 16), ("kto", 36), ("sft", 12)])
def test_a_method_trains_on_an_export(ftcore, tmp_path, method, rows_expected):
    said = [(f"Where is form {k}?", f"a{k}", f"b{k}", "left", None) for k in range(8)]
    said += [(f"Where is key {k}?", f"a{k}", None, "edit", f"In box {k}.") for k in range(8)]
    said += [(f"Where is door {k}?", f"a{k}", None, "good", None) for k in range(4)]
    measuring = votes_of(*((f"Where is room {k}?", "a", "b", "left", None) for k in range(50)), purpose="measure")
    measuring = [vote | {"id": f"m{k}"} for k, vote in enumerate(measuring)]
    path = write(tmp_path / "votes.jsonl", votes_of(*said) + measuring)
    words = [*FAST, f"method={method}", "data=feedback", f"data.path={path}", "max_steps=2", "data.test_share=0.2"]
    outcome = ftcore(*words)
    assert outcome.status == 0, outcome.err
    assert len(outcome.metrics) == 2 and all(line["loss"] > 0 for line in outcome.metrics if "loss" in line)
    train, held_out = rows_of_run(Run(outcome.folder))
    assert len(train) + len(held_out) == rows_expected and not [row for row in train if "room" in row["prompt"]]
