"""`ui` in a real browser: pages, keys, votes, a cycle from votes to a new run, and what a page must never do."""

import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from urllib.parse import urlencode

import pytest

from ftcore.cli.command import run_command
from ftcore.run_folder import Run
from tests.conftest import FAST, latest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="this machine has no Chromium: apt-get install chromium"),
]
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
SAMPLED = ["evaluate.max_rows=12", "evaluate.max_new_tokens=4"]


@contextmanager
def served(folder, *words):
    """The page of an output folder: its address with the token."""
    command = [sys.executable, "-m", "ftcore", "ui", "ui.open=false", "ui.port=0", f"output_dir={folder}", *words]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder.parent)
    try:
        yield re.search(r"http://\S+", page.stdout.readline())[0]
    finally:
        page.terminate()
        page.wait(10)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An output folder with a run, answers to vote on, and a run from that run."""
    folder = tmp_path_factory.mktemp("ui") / "runs"
    words = latest(*FAST, *SAMPLED, "max_steps=3", f"output_dir={folder}")
    assert run_command([*words, "name=first"]) == 0
    (first,) = Run.named(folder / "first")
    assert run_command(["feedback", f"run={first}", "answers=16", f"output_dir={folder}"]) == 0
    assert run_command([*latest(*words, "seed=1"), "name=second", f"model.path={first}"]) == 0
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, runs):
    """A page that was given the token; what it asked for and what it complained of are kept."""
    with served(runs) as address:
        opened = browser.new_page()
        opened.asked, opened.errors = [], []
        opened.on("request", lambda request: opened.asked.append(request.url))
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.on("console", lambda said: opened.errors.append(said.text) if "favicon" not in said.text else None)
        opened.goto(address)
        opened.home = address.partition("/?")[0]
        yield opened
        assert all(url.startswith(opened.home) for url in opened.asked), "nothing is asked of another host"
        opened.close()


def press(page, key):
    """A key that leads to the next page."""
    with page.expect_navigation():
        page.keyboard.press(key)


def place(runs, name):
    return f"{name}/{Run.named(runs / name)[0].name}"


def vote_url(page, runs, purpose="teach", second="first"):
    other = place(runs, second) if second else ""
    return f"{page.home}/vote?rater=Ann&purpose={purpose}&first={place(runs, 'first')}&second={other}"


def pages(runs):
    first, second = place(runs, "first"), place(runs, "second")
    vote = f"/vote?rater=Zoe&purpose=teach&first={first}&second={first}"
    return [
        "/",
        f"/runs/{first}",
        f"/compare?run={first}&run={second}",
        "/feedback",
        vote,
        "/cycle",
        "/jobs",
        f"/data/{first}",
    ]


def test_no_page_has_a_fault_for_people_who_use_aids(page, runs):
    page.goto(f"{page.home}/data/{place(runs, 'first')}")
    page.get_by_text("Rows as the model reads them").wait_for()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for path in pages(runs):
            page.goto(page.home + path)
            found = axe.Axe().run(page).response["violations"]
            assert not found, (path, scheme, [(one["id"], one["nodes"][0]["html"]) for one in found])
    assert not page.errors


def test_nothing_is_wider_than_a_narrow_screen(page, runs):
    page.set_viewport_size({"width": 400, "height": 800})
    for path in pages(runs):
        page.goto(page.home + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, path


def test_votes_by_keys_alone_are_kept_and_undone(page, runs):
    from ftcore.data.feedback import Feedback

    store = Feedback(runs)
    page.goto(vote_url(page, runs))
    before = len(store.votes())
    for n, key in enumerate(("1", "ArrowRight", "3", "4"), 1):
        press(page, key)
        assert len(store.votes()) == before + n
    assert [vote["choice"] for vote in store.votes()][-4:] == ["left", "right", "tie", "both_bad"]
    press(page, "u")
    assert len(store.votes()) == before + 3
    page.keyboard.press("e")
    page.keyboard.press("n")
    page.keyboard.type("1 too short")  # keys are letters while one types
    page.keyboard.press("Escape")
    press(page, "2")
    assert store.votes()[-1]["note"] == "1 too short" and store.votes()[-1]["choice"] == "right"


def test_a_correction_becomes_what_is_learned(page, runs):
    from ftcore.data.feedback import Feedback

    page.goto(vote_url(page, runs, second=None))
    page.locator("textarea[name=text]").fill("An X-ray.")
    with page.expect_navigation():
        page.get_by_role("button", name="Instead of the").click()
    last = Feedback(runs).votes()[-1]
    assert (last["choice"], last["text"]) == ("edit", "An X-ray.")


def test_from_votes_to_the_next_run_without_a_command(page, runs):
    page.goto(vote_url(page, runs))
    for _ in range(8):
        if page.locator(".pair").count():
            press(page, "1")
    page.goto(f"{page.home}/cycle?run={place(runs, 'first')}")
    page.get_by_label("Name").fill("taught")
    page.get_by_label("Passes").fill("1")
    page.get_by_role("button", name="Check it").click()
    page.get_by_role("button", name="Start").click(timeout=90_000)
    page.get_by_role("link", name="Its run").click(timeout=90_000)
    page.get_by_text("done", exact=True).first.wait_for(timeout=90_000)
    (made,) = Run.named(runs / "taught")
    assert made.summary and made.config["choices"]["method"] == "dpo"
    assert made.parents[0].name == Run.named(runs / "first")[0].name
    page.goto(page.home)
    assert page.locator("th.d1", has_text="taught").count() == 1  # below the run that it was made from


def test_the_curve_moves_while_a_run_trains(page, runs):
    words = latest(*FAST, *SAMPLED, "max_steps=4000", f"output_dir={runs}", "name=long", "validate_every=null")
    training = subprocess.Popen([sys.executable, "-m", "ftcore", *words], cwd=runs.parent, stdout=subprocess.DEVNULL)
    try:
        for _ in range(150):
            found = [run for run in Run.named(runs / "long") if run.metrics_file.is_file()]
            if found:
                break
            page.wait_for_timeout(200)
        page.goto(f"{page.home}/runs/{place(runs, 'long')}")
        status = page.locator("[data-live] [role=status]")
        first = status.inner_text()
        page.wait_for_function(
            "text => document.querySelector('[data-live] [role=status]').innerText !== text", arg=first, timeout=20_000
        )
        page.get_by_role("button", name="Stop").click()
        assert training.wait(60) == 143
        page.goto(f"{page.home}/runs/{place(runs, 'long')}")
        assert page.get_by_role("button", name="Go on").count() == 1
    finally:
        training.kill()


OWNED = "document.title = 'owned'"
HOSTILE = [
    f"<script>{OWNED}</script>",
    f'<img src=x onerror="{OWNED}">',
    f"</textarea><script>{OWNED}</script>",
    f'<svg/onload="{OWNED}">',
    "javascript:alert(1)",
    "\x1b[31mred\x1b[0m \x1b]0;owned\x07",
    "\u202eright to left\u2066",
    "{{ 7 * 7 }}{% raw %}",
    "' OR 1=1; DROP TABLE votes; --",
    "&lt;b&gt;",
    "\0 nothing",
    "a" * 1_000_000,
]


def test_hostile_answers_names_and_notes_are_text(page, runs):
    from ftcore.data.feedback import Feedback

    store = Feedback(runs)
    store.add_prompts(f"Hostile {k}? {text[:999]}" for k, text in enumerate(HOSTILE))
    found = store.unanswered("evil", 1000, 1)
    store.add_answers("evil", ((id, k, f"{k} {HOSTILE[id % len(HOSTILE)]}") for id, _ in found for k in (0, 1)))
    for k in range(50):
        name = f"{HOSTILE[k % len(HOSTILE)][:50]}{k}"
        session = {"rater": name, "purpose": "teach", "first": "evil", "second": "evil"}
        page.goto(f"{page.home}/vote?{urlencode(session)}")
        page.locator("input[name=note]").fill(HOSTILE[k % len(HOSTILE)][:900].replace("\x00", ""))
        page.keyboard.press("Escape")
        press(page, "1")
    page.goto(f"{page.home}/feedback")
    assert page.title() == "Feedback - ftcore" and not page.errors
    assert "\x1b" not in page.content() and "\u202e" not in page.content()
