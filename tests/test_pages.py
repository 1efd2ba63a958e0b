"""The pages of `ui` without a browser: who may see them, what they show, what they do."""

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time

import pytest
import yaml
from starlette.testclient import TestClient

from ftcore.config.compose import load_config, of_run
from ftcore.data.feedback import Feedback
from ftcore.run_folder import Run
from ftcore.runs.queue import Queue
from ftcore.ui import charts, report
from ftcore.ui.server import application

TOKEN = "the-token"
HOME = "http://127.0.0.1:8765"
TEXT = "What is the secret?"
INLINE = re.compile(r"<script(?! src=\"/)|\sstyle=|\son\w+=|https?://(?!127\.0\.0\.1)", re.IGNORECASE)


def made(folder, place, *words, rows=3, failure=None, parents=()):
    """A run folder as a run leaves it."""
    run = Run(folder / place)
    run.folder.mkdir(parents=True)
    run.write_config(of_run(load_config(["model=tiny", "logger=none", *words])))
    run.model.mkdir()
    run.begin({"steps": 4, "first_batch": []})
    run.metrics_file.write_text("".join(json.dumps({"step": k, "train/loss": 2.0 / k}) + "\n" for k in range(1, 5)))
    samples = [
        {"id": f"r{k}", "prompt": TEXT, "expected": "yes", "base": "no", "tuned": f"answer {k}"}
        | {"base_right": k == 0, "tuned_right": k == 1}
        for k in range(rows)
    ]
    private = "private=true" in words
    kept = [
        {k: v for k, v in row.items() if not private or k in ("id", "base_right", "tuned_right")} for row in samples
    ]
    scores = {
        "base": {"accuracy": 0.1, "loss": 2.0, "rows": rows},
        "tuned": {"accuracy": 0.4, "loss": 1.0, "rows": rows},
    }
    interval = {"low": 0.1, "high": 0.5, "verdict": "better", "rows_needed": None}
    more = {"failure": failure} if failure else {}
    named = [{"run": str(folder / parent), "name": "x", "weights": "0"} for parent in parents]
    run.finish(
        {**scores, **more, "intervals": {"accuracy": interval}, "data_rows": 9, "seconds": 5.0, "parents": named},
        kept,
        {},
    )
    return run


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "runs"
    made(folder, "a/2026-01-01_00-00-00")
    made(folder, "b/2026-01-02_00-00-00", "seed=7", parents=["a/2026-01-01_00-00-00"])
    made(folder, "hidden/2026-01-03_00-00-00", "private=true")
    made(folder, "failed/2026-01-04_00-00-00", failure="The last 4 of 4 steps were skipped.")
    return folder


@pytest.fixture
def client(folder):
    client = TestClient(application(folder, False, TOKEN, "ftcore"), base_url=HOME, follow_redirects=False)
    assert client.get(f"/?token={TOKEN}").status_code == 303
    return client


def post(client, path, **form):
    return client.post(path, data=form, headers={"origin": HOME})


def test_the_token_becomes_a_cookie_and_leaves_the_address(folder):
    client = TestClient(application(folder, False, TOKEN, "ftcore"), base_url=HOME, follow_redirects=False)
    assert client.get("/").status_code == client.get("/?token=wrong").status_code == 403
    answer = client.get(f"/jobs?token={TOKEN}")
    assert answer.headers["location"] == "/jobs"
    assert {"httponly", "samesite=strict"} <= {part.strip().lower() for part in answer.headers["set-cookie"].split(";")}
    assert client.get("/").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8765"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:8765"},
        {"origin": HOME, "content-length": "2000001"},
        {"origin": HOME, "content-length": "x"},
        {"sec-fetch-site": "cross-site"},
        {},
    ],
)
def test_requests_of_others_are_refused(client, folder, headers):
    form = {"place": "a/2026-01-01_00-00-00", "sure": "yes"}
    assert 400 <= client.post("/delete", data=form, headers=headers).status_code < 500
    assert (folder / "a/2026-01-01_00-00-00").is_dir()


OUTSIDE = ["/runs/../secret", "/runs/%2e%2e/secret", "/runs/..%2fsecret", "/runs//etc", "/runs/a", "/runs/out"]


@pytest.mark.parametrize("path", [*OUTSIDE, "/data/../secret", "/sweeps/..%2f"])
def test_nothing_outside_of_the_output_folder_is_shown(client, folder, path):
    made(folder.parent, "secret")
    (folder / "out").symlink_to(folder.parent / "secret")
    answer = client.get(path)
    assert 400 <= answer.status_code < 500 and TEXT not in answer.text
    for place in ("../secret", str(folder.parent / "secret"), "out", ""):
        assert 400 <= post(client, "/delete", place=place, sure="yes").status_code < 500
    assert (folder.parent / "secret").is_dir()


PAGES = [
    "/",
    "/runs/a/2026-01-01_00-00-00",
    "/compare?run=a/2026-01-01_00-00-00&run=b/2026-01-02_00-00-00",
    "/feedback",
    "/cycle",
    "/jobs",
]


@pytest.mark.parametrize("path", [*PAGES, "/nothing"])
def test_every_page_forbids_what_is_not_ours(client, path):
    answer = client.get(path)
    assert answer.headers["content-security-policy"] == "default-src 'self'"
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"
    assert not INLINE.search(answer.text.replace("/tmp", "")), INLINE.search(answer.text)


def test_an_empty_folder_says_what_to_type(tmp_path):
    client = TestClient(application(tmp_path, False, TOKEN, "ftcore"), base_url=HOME)
    assert "python -m ftcore" in client.get(f"/?token={TOKEN}").text
    assert "a foundation model" in client.get("/cycle").text


def test_runs_stand_below_what_they_were_made_from_and_can_be_found(client):
    page = client.get("/").text
    assert re.search(r'class="d0".*?a/2026.*?class="d1".*?b/2026', page, re.DOTALL)
    assert "40.0%" in page and "better" in page
    found = client.get("/?q=hidden").text
    assert "hidden/2026" in found and "b/2026" not in found
    assert client.get("/?sort=name").text.count('class="d0"') == 4
    assert "There is no such run" in client.get("/runs/x/y").text


def test_a_run_is_shown_with_the_answers_that_changed(client):
    page = client.get("/runs/a/2026-01-01_00-00-00").text
    assert "answer 2" in page and "Step 4 of 4" in page and "<svg" in page and "python -m ftcore model=tiny" in page
    worse = client.get("/runs/a/2026-01-01_00-00-00?show=worse").text
    assert "answer 0" in worse and "answer 1" not in worse and "1 of 3 rows" in worse
    assert "2 of 3" not in client.get("/runs/a/2026-01-01_00-00-00?q=answer+2").text
    assert "steps were skipped" in client.get("/runs/failed/2026-01-04_00-00-00").text


def test_two_runs_differ_in_the_keys_that_are_shown(client):
    page = client.get(PAGES[2]).text
    table = page[page.index("Differences") :]
    assert re.findall(r'<th scope="row">([\w.]+)</th>', table[: table.index("</table>")]) == ["seed"]


def test_texts_of_private_runs_are_nowhere(client, folder):
    assert TEXT not in client.get("/runs/hidden/2026-01-03_00-00-00").text
    vote = "/vote?rater=A&purpose=measure&first=hidden/2026-01-03_00-00-00&second=hidden/2026-01-03_00-00-00/base"
    assert "show_private=true" in client.get(vote).text
    assert TEXT not in report.of_run(Run(folder / "hidden/2026-01-03_00-00-00")).read_text()
    assert TEXT in report.of_run(Run(folder / "a/2026-01-01_00-00-00")).read_text()


def test_prompts_of_private_runs_are_not_shown_beside_others_answers(client, folder):
    store = Feedback(folder)
    assert not store.votes() and not store.authors()
    with sqlite3.connect(store.file) as file:
        values = (1, b"key", "teach", "hidden/2026-01-03_00-00-00", "r0")
        file.execute("INSERT INTO prompts (id, question, purpose, run, row) VALUES (?, ?, ?, ?, ?)", values)
    store.add_answers("m", [(1, 1, "one"), (1, 2, "two")])
    answer = client.get("/vote?rater=A&purpose=teach&first=m&second=m")
    assert (
        answer.status_code == 422 and "show_private=true" in answer.text and "one" not in answer.text.split("<h1>")[1]
    )


def test_deleting_needs_a_tick_and_nobody_in_the_folder(client, folder):
    run = Run(folder / "a/2026-01-01_00-00-00")
    place = "a/2026-01-01_00-00-00"
    assert post(client, "/delete", place=place).status_code == 422
    with run.held():
        assert post(client, "/delete", place=place, sure="yes").status_code == 409
    assert post(client, "/delete", place=place, sure="yes").status_code == 303 and not run.folder.exists()


@pytest.mark.parametrize(
    "owner", ["{pid} on {host} since 1.00", "{pid} on elsewhere since {since}", "{pid} on {host}", "nonsense"]
)
def test_only_the_process_of_a_run_is_stopped(client, folder, owner):
    import psutil

    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        since = f"{psutil.Process(sleeper.pid).create_time():.2f}"
        run = Run(folder / "a/2026-01-01_00-00-00")
        text = f"process {owner}".format(pid=sleeper.pid, host=socket.gethostname(), since=since)
        (run.folder / "owner").write_text(text)
        assert post(client, "/stop", place="a/2026-01-01_00-00-00").status_code == 409 and sleeper.poll() is None
        (run.folder / "owner").write_text(f"process {sleeper.pid} on {socket.gethostname()} since {since}")
        assert post(client, "/stop", place="a/2026-01-01_00-00-00").status_code == 303
        assert sleeper.wait(10) == -15
    finally:
        sleeper.kill()


def test_a_cycle_needs_fields_that_say_something_and_a_check(client):
    run = {"run": "a/2026-01-01_00-00-00", "method": "dpo", "name": "next"}
    for wrong in ({"name": "../x"}, {"name": ""}, {"method": "nothing"}, {"passes": "many"}, {"lr": "1;rm"}):
        assert post(client, "/cycle", **{**run, **wrong}).status_code == 422
    assert post(client, "/cycle/start", number="1").status_code == 422


def finished(queue, number, seconds=60):
    for _ in range(seconds * 10):
        if (job := queue.job(number)).state not in ("queued", "running"):
            return job
        time.sleep(0.1)
    raise AssertionError(queue.job(number))


def test_jobs_run_one_at_a_time_training_first_and_say_how_they_ended(tmp_path, monkeypatch):
    queue = Queue(tmp_path)
    monkeypatch.setattr(Queue, "wake", lambda self: None)
    answers = queue.add("answers", "ahead", ["--version"])
    wrong, right, stopped = (
        queue.add("train", "job", words) for words in (["method=x y; touch owned"], ["--version"], ["--version"])
    )
    queue.stop(stopped.number)
    queue.work()
    jobs = {number: queue.job(number) for number in range(1, 5)}
    assert [jobs[k].state for k in (1, 2, 3, 4)] == ["done", "failed", "done", "stopped"]
    assert jobs[wrong.number].exit == 2 and "ConfigError" in queue.log(wrong.number).read_text()
    assert (
        jobs[wrong.number].ended <= jobs[right.number].begun and jobs[right.number].ended <= jobs[answers.number].begun
    )
    assert "ftcore" in queue.log(right.number).read_text() and not (tmp_path / "owned").exists()


def test_a_job_outlives_the_page_and_its_queue(tmp_path):
    queue = Queue(tmp_path)
    words = ["model=tiny", "logger=none", "max_steps=400", "evaluate.enabled=false", "name=a", f"output_dir={tmp_path}"]
    job = queue.add("train", "a", words)
    for _ in range(300):
        if (job := queue.job(job.number)).state == "running":
            break
        time.sleep(0.1)
    import psutil

    psutil.Process(job.process[0]).parent().kill()  # the queue's worker, as a machine under pressure does
    assert psutil.Process(job.process[0]).is_running()
    later = queue.add("train", "b", ["--version"])
    assert finished(queue, later.number).state == "done"
    assert queue.job(job.number).state == "lost" and queue.run_of(job).summary


def test_reports_are_one_small_file(folder, ftcore):
    run = made(folder, "long/2026-02-01_00-00-00", rows=500)
    assert ftcore("report", f"run={run}").status == 0
    page = (run.folder / "report.html").read_text()
    assert len(page.encode()) < 300_000 and "<script" not in page and "default-src 'none'" in page
    assert not re.search(r"(src|href)=", page)


def test_a_page_for_others_or_on_a_port_in_use_is_refused(fails, tmp_path):
    assert "ssh -L" in fails(2, "ui", "host=0.0.0.0", "open=false")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be used" in fails(5, "ui", f"port={taken.getsockname()[1]}", "open=false")


def test_without_its_packages_the_page_says_what_to_install(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "sse_starlette", None)
    assert "pip install 'ftcore[ui]'" in fails(2, "ui", "port=0", "open=false")


def test_charts_keep_the_ends_and_take_what_is_no_number():
    line = charts.thinned((range(100_000), [0.0] * 99_998 + [9.0, -9.0]))
    assert len(line[0]) <= 2 * charts.BUCKETS + 1 and max(line[1]) == 9 and min(line[1]) == -9
    assert charts.lines("x", {"a": ([1, 2], [float("nan"), None])}) == ""
    assert "<circle" in charts.lines("x", {"a": ([1], [2.0])}) and "<polyline" in charts.lines(
        "x", {"a": ([1, 2], [3.0, 3.0])}
    )
    assert "<script" not in charts.lines("<script>", {"<script>": ([1], [1.0])})
    assert "<b" not in charts.dots("x", [("<b>", 1.0, "<i>"), ("y", 2.0, "z")])
    assert charts.ticks(0.013, 0.019) and len(charts.ticks(-1e9, 1e9)) <= 7


def test_runs_are_listed_whatever_lies_among_them(folder, ftcore, monkeypatch):
    for name, parent in (("c", "d"), ("d", "c")):  # each says that it was made from the other
        made(folder, f"{name}/2026-03-01_00-00-00", parents=[f"{parent}/2026-03-01_00-00-00"])
    made(folder, "orphan/2026-03-02_00-00-00", parents=["gone/x"])
    (folder / "half").mkdir()
    (folder / "half" / "config.yaml").write_text(yaml.safe_dump({"name": "half"})[:5])
    (folder / "b/2026-01-02_00-00-00/summary.json").write_text('{"base": ')
    outcome = ftcore("runs", f"output_dir={folder}", "json=true")
    assert outcome.status == 0, outcome.err
    places = [entry["place"] for entry in json.loads(outcome.out)["runs"]]
    assert sorted(place.split("/")[0] for place in places) == ["a", "b", "c", "d", "failed", "hidden", "orphan"]
    assert os.environ.get("FTCORE_PRIVATE") != "1"
