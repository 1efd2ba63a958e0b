"""An expert in the browser: three cycles, sft -> votes -> training -> votes -> training, without a command.

    python benchmarks/cycles.py [folder] [prompts] [method]

A script opens the page of an empty folder in Chromium and does what an expert would, by its buttons and keys: it begins a first
run on data=medical, lets its model write answers to training prompts, votes on them by the reference answers (one vote in ten is
wrong on purpose; where both answers are wrong it writes the right one), trains on the votes by the method that the page proposes
(or by the one that is given), and again. Then it compares each two models blindly on the held-out prompts, with as much noise.
Wall and CPU time, accuracy and win-rates go to results/cycles.json.
"""

import json
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from ftcore.data.feedback import Feedback
from ftcore.data.sources import rows_of
from ftcore.evaluate.preferences import counts, preferred
from ftcore.rewards.functions import contains_answer
from ftcore.run_folder import Run

NOISE = 0.1
MEDICAL = "ftcore://medical/sft.{}.jsonl"
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MINUTES = 15  # that a job may take
FIRST_PASSES, PASSES = 0.5, 3


class Expert:
    """Somebody who knows the answers, and errs one time in ten."""

    def __init__(self, page: Page, home: str, folder: Path, method: str | None) -> None:
        self.page, self.home, self.folder, self.method, self.random = page, home, folder, method, random.Random(0)
        rows = [row for part in ("train", "test") for _, row in rows_of(MEDICAL.format(part))]
        self.answers = {row["prompt"]: row for row in rows}

    def wait(self, state: str = "done") -> None:
        """Wait on the page of a job until it has ended."""
        self.page.locator(f"main > p > .tag.{state}").wait_for(timeout=MINUTES * 60_000)

    def first_run(self) -> str:
        """The first run, from the page of a folder without one."""
        self.page.goto(self.home)
        self.page.get_by_role("link", name="Or begin it here").click()
        self.page.get_by_label("Passes").fill(str(FIRST_PASSES))
        return self._check_and_start("first")

    def next_run(self, place: str, name: str) -> str:
        """The next cycle from a run, by the method that the page proposes."""
        self.page.goto(f"{self.home}/cycle?run={place}")
        if self.method:
            self.page.get_by_label("Method").select_option(self.method)
        self.page.get_by_label("Passes").fill(str(PASSES))
        self.page.get_by_label("Name").fill(name)
        return self._check_and_start(name)

    def _check_and_start(self, name: str) -> str:
        self.page.get_by_role("button", name="Check it").click()
        self.page.get_by_role("button", name="Start").click(timeout=180_000)
        self.wait()
        return f"{name}/{Run.named(self.folder / name)[0].name}"

    def write_answers(self, place: str, prompts: int) -> None:
        """Let a model write answers."""
        self.page.goto(f"{self.home}/feedback")
        panel = self.page.locator("form[action='/answers']")
        panel.locator("select").select_option(place)
        panel.locator("input[name=count]").fill(str(prompts))
        panel.get_by_role("button").click()
        self.wait()

    def vote(self, purpose: str, first: str, second: str, most: int) -> int:
        """Vote until nothing is left, or `most` times."""
        self.page.goto(f"{self.home}/vote?rater=Expert&purpose={purpose}&first={first}&second={second}")
        for n in range(most):
            if not self.page.locator(".pair").count():
                return n
            with self.page.expect_navigation():
                self._say(*(text.inner_text() for text in self.page.locator(".text").all()), purpose)
        return most

    def _say(self, prompt: str, left: str, right: str, purpose: str) -> None:
        row = self.answers[prompt]
        rights = [bool(contains_answer([text], answer=[row["answer"]])[0]) for text in (left, right)]
        if self.random.random() < NOISE:
            self.page.keyboard.press(self.random.choice("12"))
        elif rights == [False, False] and purpose == "teach":
            self.page.keyboard.press("e")
            self.page.locator("textarea[name=text]").fill(row["completion"])
            self.page.get_by_role("button", name=f"Instead of the {self.random.choice(('left', 'right'))}").click()
        else:
            self.page.keyboard.press(
                {(True, False): "1", (False, True): "2", (True, True): "3"}.get(tuple(rights), "4")
            )


@contextmanager
def served(folder: Path):
    """The page of an output folder."""
    command = [sys.executable, "-m", "ftcore", "ui", "open=false", "port=0", f"output_dir={folder}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://\S+", server.stdout.readline())[0]
    finally:
        server.terminate()
        server.wait()


def main(folder: Path, prompts: int, method: str | None) -> None:
    """Play the expert and print what came of it."""
    begun, asked = time.perf_counter(), []
    with served(folder) as address, sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        expert = Expert(page, address.partition("/?")[0], folder, method)
        places, times = [expert.first_run()], [time.perf_counter() - begun]
        for name in ("second", "third"):
            expert.write_answers(places[-1], prompts)
            expert.vote("teach", places[-1], places[-1], prompts)
            places.append(expert.next_run(places[-1], name))
            times.append(time.perf_counter() - begun)
        expert.write_answers(places[-1], 1)
        for first, second in ((2, 0), (1, 0), (2, 1)):
            expert.vote("measure", places[first], places[second], 168)
        page.screenshot(path=folder / "end.png")
    print(json.dumps(report(folder, places, times, time.perf_counter() - begun, asked), indent=2))


def report(folder: Path, places: list[str], times: list[float], wall: float, asked: list[str]) -> dict[str, object]:
    """Figures of the cycles, also in results/cycles.json."""
    votes = Feedback(folder).votes()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "minutes": wall / 60,
        "cpu_minutes_of_the_page": (used.ru_utime + used.ru_stime) / 60,
        "minutes_to_each_model": [seconds / 60 for seconds in times],
        "votes": {
            place: counts([v for v in votes if place in (v["left_author"], v["right_author"])]) for place in places
        },
        "methods": [Run(folder / place).config["choices"]["method"] for place in places],
        "accuracy": [Run(folder / place).summary.score("tuned.accuracy") for place in places],
        "seconds_of_runs": [Run(folder / place).summary.score("seconds") for place in places],
        "wins": {f"{a + 1} over {b + 1}": preferred(votes, places[a], places[b]) for a, b in ((2, 0), (1, 0), (2, 1))},
        "requests_to_other_hosts": sum("//127.0.0.1" not in url for url in asked),
    }
    (Path(__file__).parent / "results" / "cycles.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    given = dict(enumerate(sys.argv[1:]))
    main(Path(given.get(0) or tempfile.mkdtemp()).resolve() / "runs", int(given.get(1, "240")), given.get(2))
