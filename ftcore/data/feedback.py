"""What people say of models' answers: one SQLite file that keeps every vote. `votes.py` makes rows of it.

A prompt is a row of a run's data, known by its id and read where it stands, or typed by a rater. An answer is what a model (its
author: a run, or the base model of one) wrote to it. A vote is a rater's word on one answer or on two. Votes on training rows and
on typed prompts teach; those on held-out rows only measure, and never become rows.
"""

import os
import secrets
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, cast, get_args

import psutil
from filelock import FileLock

from ftcore.config.build import build, record_type
from ftcore.data.records import Data
from ftcore.data.sources import Row
from ftcore.data.splits import question_key
from ftcore.errors import DataError, FtcoreError
from ftcore.run_folder import Run

NAME = "feedback.db"
Purpose = Literal["teach", "measure"]
Choice = Literal["left", "right", "tie", "both_bad", "good", "bad", "edit", "skip"]
CHOICES = get_args(Choice)
PAIRED: tuple[Choice, ...] = ("left", "right", "tie", "both_bad")
# Score of the left answer, of a vote on two.
SCORE = {"left": 1.0, "right": 0.0, "tie": 0.5, "both_bad": 0.5}
# File systems whose locks and shared memory hold, so that readers need not wait for a writer.
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "apfs", "hfs", "ntfs", "tmpfs", "overlay", "f2fs", "bcachefs"}
LONGEST = 100_000  # characters of what a rater writes
MOST_PROMPTS = 2_000  # training rows of a run that are put before raters
EACH = 5  # one pair in so many is one that others have voted on, so that it shows whether raters agree
TABLES = """
CREATE TABLE IF NOT EXISTS prompts (id INTEGER PRIMARY KEY, question BLOB UNIQUE, purpose TEXT, run TEXT, row TEXT, text TEXT);
CREATE TABLE IF NOT EXISTS answers (id INTEGER PRIMARY KEY, prompt INTEGER REFERENCES prompts, author TEXT, sample INTEGER,
  text TEXT, UNIQUE (prompt, author, sample));
CREATE TABLE IF NOT EXISTS votes (id TEXT PRIMARY KEY, time REAL, rater TEXT, left INTEGER REFERENCES answers,
  right INTEGER REFERENCES answers, choice TEXT, text TEXT, note TEXT, undone INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS held_out (question BLOB PRIMARY KEY);
CREATE INDEX IF NOT EXISTS answers_by_author ON answers (author, prompt);
CREATE INDEX IF NOT EXISTS votes_by_rater ON votes (rater, time);
"""
VOTES = """SELECT v.id, v.time, v.rater, v.choice, v.text, v.note, v.undone, p.id AS prompt, p.run, p.row,
  CASE WHEN p.question IN (SELECT question FROM held_out) THEN 'measure' ELSE p.purpose END AS purpose,
  p.text AS typed, p.question, l.id AS left_id, l.author AS left_author, l.text AS left,
  r.id AS right_id, r.author AS right_author, r.text AS right
  FROM votes v JOIN answers l ON l.id = v.left LEFT JOIN answers r ON r.id = v.right JOIN prompts p ON p.id = l.prompt"""


class Pair(NamedTuple):
    """Two answers to a prompt, or one (`right` is None), by their ids in the store."""

    prompt: int
    left: int
    right: int | None


class Shown(NamedTuple):
    """What a rater sees of a pair; the run whose row the prompt is, None when it was typed."""

    prompt: str | None
    left: str
    right: str | None
    purpose: Purpose
    run: str | None


class Vote(TypedDict):
    """A vote with the texts it is about, as it is exported."""

    id: str
    time: float
    rater: str
    purpose: Purpose
    prompt: str
    left: str
    right: str | None
    authors: list[str]
    choice: Choice
    text: str | None
    note: str | None


class Feedback:
    """The store of an output folder. Every method opens the file anew, so that any thread and process may call it."""

    def __init__(self, output_dir: Path, name: str = NAME) -> None:
        self.folder = output_dir
        self.file = output_dir / name

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection in one transaction, in which nobody else writes, and which is on the disk when the block ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self._made(), timeout=30, isolation_level=None)) as store:
                store.row_factory = sqlite3.Row
                with FileLock(f"{self.file}.lock", mode=0o600):
                    # This waits for whoever writes; changing the journal does not.
                    store.executescript("BEGIN IMMEDIATE; COMMIT")
                    store.execute(f"PRAGMA journal_mode={'WAL' if is_local(self.folder) else 'DELETE'}")
                    store.executescript(TABLES)
                store.execute("PRAGMA synchronous=FULL")
                store.execute("BEGIN IMMEDIATE")
                with store:
                    yield store
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self.file} cannot be used as a store of votes: {error}.") from None

    def _made(self) -> Path:
        """The file, which is its owner's alone from the start."""
        os.close(os.open(self.file, os.O_CREAT, 0o600))
        return self.file

    # Prompts and answers.

    def add_run(self, run: Run) -> None:
        """Take in the rows of a run's data: training prompts to teach with, the held-out ones to measure on, and its answers."""
        name = self.author(run)
        train, held_out = rows_of_run(run)
        with self._open() as store:
            keys = {row["id"]: question_key(row) for row in held_out}
            # The last question alone too, as somebody would type it, without a system message or earlier turns.
            asked = (question_key({"prompt": row["prompt"]}) for row in held_out if "prompt" in row)
            store.executemany("INSERT OR IGNORE INTO held_out VALUES (?)", ((key,) for key in {*keys.values(), *asked}))
            chosen = sorted((question_key(row), row["id"]) for row in train if "prompt" in row)[:MOST_PROMPTS]
            new = [(key, "teach", name, id) for key, id in chosen if not _is_held_out(store, key)]
            new += [(keys[row["id"]], "measure", name, row["id"]) for row in held_out if "prompt" in row]
            store.executemany("INSERT OR IGNORE INTO prompts (question, purpose, run, row) VALUES (?, ?, ?, ?)", new)
            runs = [row[0] for row in store.execute("SELECT DISTINCT run FROM prompts WHERE text IS NULL")]
            gone = [other for other in runs if not Run(self.folder / other).begun]
            moved = ((name, id, key, other) for key, _, _, id in new for other in gone)
            store.executemany("UPDATE prompts SET run = ?, row = ? WHERE question = ? AND run = ?", moved)
            for sample in run.samples():
                for side, author in (("base", f"{name}/base"), ("tuned", name)):
                    if side in sample and (key := keys.get(sample["id"])):
                        _add_answer(store, _prompt_of(store, key), author, 0, str(sample[side]))

    def add_prompts(self, texts: Iterable[str]) -> int:
        """Take in typed prompts, to teach with; returns how many are new. Raises `DataError` for one that is held out."""
        with self._open() as store:
            before = store.total_changes
            for text in texts:
                _check_length(text)
                if not text.strip():
                    raise DataError("A prompt has at least one word.")
                key = question_key({"prompt": text})
                if _is_held_out(store, key):
                    raise DataError("This question is held out to measure models; one that teaches must be another.")
                values = (key, "teach", text)
                store.execute("INSERT OR IGNORE INTO prompts (question, purpose, text) VALUES (?, ?, ?)", values)
            return store.total_changes - before

    def unanswered(self, author: str, count: int, samples: int) -> list[tuple[int, str]]:
        """Id and text of the next prompts to teach with that have fewer than `samples` answers of an author.

        Those that nobody has voted on come first, and of these the typed ones.
        """
        query = """SELECT p.*, p.text AS typed FROM prompts p WHERE p.purpose = 'teach' AND
          p.question NOT IN (SELECT question FROM held_out) AND
          (SELECT COUNT(*) FROM answers a WHERE a.prompt = p.id AND a.author = ?) < ?
          ORDER BY EXISTS (SELECT 1 FROM votes v JOIN answers a ON a.id = v.left WHERE a.prompt = p.id AND NOT v.undone),
          p.text IS NULL, p.question"""
        with self._open() as store:
            found = [dict(row) for row in store.execute(query, (author, samples))]
        texts = ((row["id"], self.prompt_text(row)) for row in found)
        return list(islice(((id, text) for id, text in texts if text is not None), count))

    def add_answers(self, author: str, answers: Iterable[tuple[int, int, str]]) -> None:
        """Keep (prompt, number of the sample, text) of what an author wrote."""
        with self._open() as store:
            for prompt, sample, text in answers:
                _add_answer(store, prompt, author, sample, text)

    def prompt_text(self, prompt: Mapping[str, Any]) -> str | None:
        """A prompt's text: what was typed, or its row's, read where it stands; None when that is gone."""
        if prompt["typed"] is not None:
            return str(prompt["typed"])
        with_run = Run(self.folder / str(prompt["run"]))
        return _texts(with_run).get(str(prompt["row"])) if with_run.begun else None

    def authors(self) -> dict[str, dict[str, int]]:
        """Author -> purpose -> prompts that it has answered."""
        query = """SELECT a.author, p.purpose, COUNT(DISTINCT p.id) AS n
          FROM answers a JOIN prompts p ON p.id = a.prompt GROUP BY 1, 2"""
        found: dict[str, dict[str, int]] = defaultdict(dict)
        with self._open() as store:
            for row in store.execute(query):
                found[row["author"]][row["purpose"]] = row["n"]
        return found

    # Votes.

    def next_pair(self, rater: str, purpose: Purpose, first: str, second: str | None) -> tuple[Pair, int] | None:
        """The next two answers for a rater, sides drawn by chance, or one where `second` is None; and how many are left.

        Two of one author are two samples. One pair in `EACH` is one that others have voted on.
        """
        of_two = "b.sample > a.sample" if first == second else "b.sample = a.sample"
        join = (
            f"JOIN answers b ON b.prompt = a.prompt AND b.author = :second AND {of_two} AND b.text <> a.text"
            if second
            else ""
        )
        b = "b.id" if second else "NULL"
        same = f"NOT v.undone AND v.left IN (a.id, {b}) AND (v.right IN (a.id, {b}) OR v.right IS NULL)"
        query = f"""SELECT a.prompt, a.id AS a, {b} AS b,
          (SELECT COUNT(*) FROM votes v WHERE {same} AND v.choice <> 'skip') AS others
          FROM answers a JOIN prompts p ON p.id = a.prompt {join}
          WHERE a.author = :first AND p.purpose = :purpose
          AND (p.purpose = 'measure' OR p.question NOT IN (SELECT question FROM held_out))
          AND NOT EXISTS (SELECT 1 FROM votes v WHERE v.rater = :rater AND {same})
          ORDER BY p.text IS NULL, p.question, a.sample"""
        with self._open() as store:
            names = {"first": first, "second": second, "purpose": purpose, "rater": rater}
            found = store.execute(query, names).fetchall()
            given = store.execute("SELECT COUNT(*) FROM votes WHERE rater = ? AND NOT undone", (rater,)).fetchone()[0]
        if not found:
            return None
        seen_by_others = given % EACH == EACH - 1
        best = min(found, key=lambda row: -min(row["others"], 1) if seen_by_others else row["others"])
        sides = [best["a"], best["b"]]
        if best["b"] is not None and secrets.randbits(1):
            sides.reverse()
        return Pair(best["prompt"], *sides), len(found)

    def texts(self, pair: Pair) -> Shown:
        """Prompt, left and right answer of a pair, and the prompt's purpose. Raises `DataError` unless they are of one prompt."""
        ids = [id for id in (pair.left, pair.right) if id is not None]
        if any(not 0 <= number < 2**63 for number in (pair.prompt, *ids)):
            raise DataError("These answers are not two of one prompt.")
        with self._open() as store:
            prompt = store.execute("SELECT *, text AS typed FROM prompts WHERE id = ?", (pair.prompt,)).fetchone()
            query = f"SELECT id, prompt, text FROM answers WHERE id IN ({', '.join('?' * len(ids))})"
            found = {row["id"]: row for row in store.execute(query, ids)}
        if not prompt or len(found) != len(ids) or any(row["prompt"] != pair.prompt for row in found.values()):
            raise DataError("These answers are not two of one prompt.")
        right = found[pair.right]["text"] if pair.right is not None else None
        text = self.prompt_text(dict(prompt))
        return Shown(text, found[pair.left]["text"], right, prompt["purpose"], prompt["run"])

    def vote(self, rater: str, pair: Pair, choice: Choice, text: str | None = None, note: str | None = None) -> str:
        """Keep a vote; it is on the disk when this returns its id. Raises `DataError` for one that cannot be."""
        purpose = self.texts(pair).purpose
        for words in (rater, text or "", note or ""):
            _check_length(words)
        if not rater.strip():
            raise DataError("A vote needs the name of who gives it.")
        if choice not in CHOICES:
            raise DataError("This is no choice.")
        if choice in PAIRED and pair.right is None:
            raise DataError(f"{choice} compares two answers, and there is one.")
        if choice in ("good", "bad", "edit") and (pair.right is not None or (choice == "edit") != bool(text)):
            raise DataError(f"{choice} is said of one answer; edit alone has a text.")
        if choice in ("good", "bad", "edit") and purpose == "measure":
            raise DataError("Held-out prompts measure: two answers are compared there, and none is corrected.")
        id = secrets.token_hex(8)
        with self._open() as store:
            key = store.execute("SELECT question FROM prompts WHERE id = ?", (pair.prompt,)).fetchone()[0]
            if purpose == "teach" and choice != "skip" and _is_held_out(store, key):
                raise DataError("This question has come to be held out: a vote that teaches must be on another.")
            values = (id, time.time(), rater.strip(), pair.left, pair.right, choice, text, note)
            if found := _same_vote(store, rater.strip(), pair):  # a key that was pressed twice
                return found
            store.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)", values)
        return id

    def undo(self, rater: str) -> bool:
        """Take back the last vote of a rater; whether there was one."""
        query = "SELECT id FROM votes WHERE rater = ? AND NOT undone ORDER BY time DESC LIMIT 1"
        with self._open() as store:
            last = store.execute(query, (rater.strip(),)).fetchone()
            if last:
                store.execute("UPDATE votes SET undone = 1 WHERE id = ?", (last["id"],))
        return last is not None

    def votes(self) -> list[dict[str, Any]]:
        """All votes that stand, in the order of their time, without prompts' texts."""
        if not self.file.exists():
            return []
        with self._open() as store:
            query = f"{VOTES} WHERE NOT v.undone AND choice <> 'skip' ORDER BY v.time, v.id"
            return [dict(row) for row in store.execute(query)]

    def exported(self) -> list[Vote]:
        """All votes with their texts; those whose prompt is gone are left out."""
        votes = [(vote, self.prompt_text(vote)) for vote in self.votes()]
        return [_exported(vote, text) for vote, text in votes if text is not None]

    def take_in(self, votes: Iterable[Vote]) -> int:
        """Add votes from elsewhere but those that are here already; returns how many. Raises `DataError` for what cannot be."""
        return sum(self._take_in(vote) for vote in votes)

    def _take_in(self, vote: Vote) -> int:
        key = question_key({"prompt": vote["prompt"]})
        with self._open() as store:
            if vote["purpose"] == "teach" and _is_held_out(store, key):
                raise DataError("A vote that teaches is on a question that is held out here.")
            if vote["purpose"] == "measure":
                store.execute("INSERT OR IGNORE INTO held_out VALUES (?)", (key,))
            values = (key, vote["purpose"], vote["prompt"])
            store.execute("INSERT OR IGNORE INTO prompts (question, purpose, text) VALUES (?, ?, ?)", values)
            prompt, answers = _prompt_of(store, key), (vote["left"], vote["right"])
            sides = zip(vote["authors"], answers, strict=False)  # one author where one answer was judged
            left, *right = [_answer_like(store, prompt, author, str(answer)) for author, answer in sides]
            who, what = (vote["id"], vote["time"], vote["rater"]), (vote["choice"], vote["text"], vote["note"])
            row = (*who, left, right[0] if right else None, *what)
            return store.execute("INSERT OR IGNORE INTO votes VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)", row).rowcount

    def author(self, run: Run) -> str:
        """A run as the store calls it: its place below the output folder."""
        return os.path.relpath(run.folder.resolve(), self.folder.resolve())


def is_local(folder: Path) -> bool:
    """Whether a folder lies on a disk of this machine, as far as is known; over a network, write-ahead logs lose votes."""
    place = folder.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    return bool(mounts) and max(mounts, key=lambda part: len(part.mountpoint)).fstype.lower() in LOCAL


def rows_of_run(run: Run) -> tuple[list[Row], list[Row]]:
    """The training and the held-out rows of a run's data. Raises `DataError` when they cannot be read."""
    config = run.config
    if not config:
        raise DataError(f"{run.config_file} cannot be read.")
    records = build(config["data"], Data).load(record_type(config["method"]))
    return records.train, [*records.validation, *records.test]


@lru_cache(maxsize=8)
def _texts_of(folder: Path, changed: float) -> dict[str, str]:
    try:
        train, held_out = rows_of_run(Run(folder))
    except FtcoreError:
        return {}
    return {row["id"]: row["prompt"] for row in (*train, *held_out) if "prompt" in row}


def _texts(run: Run) -> dict[str, str]:
    """Id -> prompt of the rows of a run's data; {} when they cannot be read any more."""
    return _texts_of(run.folder, run.config_file.stat().st_mtime)


def _is_held_out(store: sqlite3.Connection, key: bytes) -> bool:
    return store.execute("SELECT 1 FROM held_out WHERE question = ?", (key,)).fetchone() is not None


def _prompt_of(store: sqlite3.Connection, key: bytes) -> int:
    return int(store.execute("SELECT id FROM prompts WHERE question = ?", (key,)).fetchone()[0])


def _same_vote(store: sqlite3.Connection, rater: str, pair: Pair) -> str | None:
    """The vote of a rater on the same answers that stands already."""
    query = """SELECT id FROM votes WHERE NOT undone AND rater = :rater AND choice <> 'skip'
      AND (left = :left AND right IS :right OR left = :right AND right = :left)"""
    found = store.execute(query, {"rater": rater, "left": pair.left, "right": pair.right}).fetchone()
    return found[0] if found else None


def _add_answer(store: sqlite3.Connection, prompt: int, author: str, sample: int, text: str) -> None:
    values = (prompt, author, sample, text)
    store.execute("INSERT OR IGNORE INTO answers (prompt, author, sample, text) VALUES (?, ?, ?, ?)", values)


def _answer_like(store: sqlite3.Connection, prompt: int, author: str, text: str) -> int:
    """The id of an author's answer of this text, which is added where it is new."""
    query = "SELECT id FROM answers WHERE prompt = ? AND author = ? AND text = ?"
    if found := store.execute(query, (prompt, author, text)).fetchone():
        return int(found[0])
    last = "SELECT COALESCE(MAX(sample) + 1, 0) FROM answers WHERE prompt = ? AND author = ?"
    _add_answer(store, prompt, author, store.execute(last, (prompt, author)).fetchone()[0], text)
    return int(store.execute(query, (prompt, author, text)).fetchone()[0])


def _check_length(text: str) -> None:
    if len(text) > LONGEST:
        raise DataError(f"This text has {len(text):,} characters; at most {LONGEST:,} are kept.")


def _exported(vote: Mapping[str, Any], prompt: str) -> Vote:
    kept = {key: vote[key] for key in ("id", "time", "rater", "purpose", "left", "right", "choice", "text", "note")}
    authors = [author for author in (vote["left_author"], vote["right_author"]) if author]
    return cast(Vote, {**kept, "prompt": prompt, "authors": authors})
