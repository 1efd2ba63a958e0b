"""The pages in the browser. What they show is made in pages.py; what they change goes to the store of votes and the queue."""

import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from ftcore.data.feedback import Feedback
from ftcore.errors import FtcoreError
from ftcore.evaluate.history import history, state_of
from ftcore.run_folder import Run
from ftcore.runs.queue import Queue
from ftcore.ui import pages
from ftcore.ui.cycle import FOUNDATION, Cycles, Inspected
from ftcore.ui.guard import Guard
from ftcore.ui.votes import Booth

HERE = Path(__file__).parent / "templates"
EVERY = 1.0  # seconds between two looks at a run that trains
Form = Mapping[str, str]


def application(folder: Path, show_private: bool, token: str, cookie: str) -> Starlette:
    """The pages of an output folder, behind their guard."""
    guard = Middleware(Guard, token=token, cookie=cookie)
    return Starlette(routes=Site(folder, show_private).routes(), middleware=[guard])


class Site:
    """The pages of an output folder."""

    def __init__(self, folder: Path, show_private: bool) -> None:
        self.folder, self.show_private = folder, show_private
        self.templates, self.queue, self.store = pages.templates(), Queue(folder), Feedback(folder)
        Thread(target=history, args=(folder,), daemon=True).start()  # what many runs are is known before the first page
        self.booth, self.cycles, self.inspected = Booth(self.store, self.queue), Cycles(folder, self.queue), Inspected()

    def routes(self) -> list[Route]:
        """All addresses: pages, and forms that change something and then lead to a page."""
        shown: dict[str, Callable[[Request], Response]] = {
            "/": self.runs, "/runs/{place:path}": self.run, "/compare": self.compare, "/sweeps/{place:path}": self.sweep,
            "/data/{place:path}": self.data, "/feedback": self.feedback, "/vote": self.vote, "/cycle": self.cycle,
            "/cycle/{number:int}": self.checked, "/jobs": self.jobs, "/jobs/{number:int}": self.job,
        }  # fmt: skip
        changed: dict[str, Callable[[Form], str]] = {
            "/stop": self.stop, "/resume": self.resume, "/delete": self.delete, "/vote": self.booth.vote,
            "/undo": self.booth.undo,
            "/prompts": self.booth.add_prompts, "/answers": self.write_answers, "/cycle": self.check_cycle,
            "/cycle/start": self.cycles.start, "/jobs/stop": self.stop_job,
        }  # fmt: skip
        routes = [Route(path, self._page(handler)) for path, handler in shown.items()]
        routes += [Route(path, self._form(handler), methods=["POST"]) for path, handler in changed.items()]
        files = [Route(f"/{name}", _file(HERE / name)) for name in ("style.css", "page.js", "icon.svg")]
        return [*routes, *files, Route("/live/{place:path}", self.live)]

    def _page(self, handler: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def show(request: Request) -> Response:
            try:
                return handler(request)
            except HTTPException as error:
                return self._error(error.detail, error.status_code)
            except FtcoreError as error:
                return self._error(str(error), 422)

        return show

    def _form(self, handler: Callable[[Form], str]) -> Callable[[Request], Any]:
        """A function of a form that returns the address of the next page."""

        async def change(request: Request) -> Response:
            form = {key: value for key, value in (await request.form()).items() if isinstance(value, str)}
            try:
                return RedirectResponse(await run_in_threadpool(handler, form), 303)
            except HTTPException as error:
                return self._error(error.detail, error.status_code)
            except FtcoreError as error:
                return self._error(str(error), 422)

        return change

    def _show(self, name: str, status: int = 200, /, **context: Any) -> Response:
        page = self.templates.get_template(f"{name}.html")
        return HTMLResponse(page.render(static=False, **context), status)

    def _error(self, message: str, status: int) -> Response:
        return self._show("error", status, title="Not possible", message=message)

    def _run(self, place: str) -> Run:
        """The run at a place below the output folder. Raises an error of HTTP when there is none."""
        run = Run((self.folder / place).resolve())
        if not run.folder.is_relative_to(self.folder) or not run.begun or not place:
            raise HTTPException(404, "There is no such run.")
        return run

    # Pages.

    def runs(self, request: Request) -> Response:
        """All runs."""
        return self._show("runs", title="Runs", **pages.runs(self.folder, request.query_params))

    def run(self, request: Request) -> Response:
        """One run."""
        place = request.path_params["place"]
        run, others = self._run(place), history(self.folder)
        children = [entry.place for entry in others if place in entry.parents]
        return self._show("run", title=run.name, **pages.one_run(run, self.folder, request.query_params, children))

    async def live(self, request: Request) -> Response:
        """What moves on a run's page, each time it has moved; an end when the run has ended."""
        from sse_starlette import EventSourceResponse

        run = await run_in_threadpool(self._run, request.path_params["place"])
        return EventSourceResponse(self._events(run))

    async def _events(self, run: Run) -> AsyncIterator[dict[str, str]]:
        from anyio import sleep

        size = -1
        while await run_in_threadpool(state_of, run, run.summary) == "running":
            now = run.metrics_file.stat().st_size if run.metrics_file.is_file() else 0
            if now != size:
                size, context = now, await run_in_threadpool(pages.live, run)
                yield {"data": self.templates.get_template("live.html").render(live=context)}
            await sleep(EVERY)
        yield {"event": "end", "data": ""}

    def compare(self, request: Request) -> Response:
        """Two runs side by side."""
        places = request.query_params.getlist("run")
        if len(places) != 2:
            raise HTTPException(422, "Tick two runs to compare them.")
        first, second = map(self._run, places)
        return self._show(
            "compare", title="Compare", places=places, **pages.compare(first, second, self.folder, request.query_params)
        )

    def sweep(self, request: Request) -> Response:
        """A sweep."""
        folder = (self.folder / request.path_params["place"]).resolve()
        if not folder.is_relative_to(self.folder) or not (folder / "sweep.json").is_file():
            raise HTTPException(404, "There is no such sweep.")
        return self._show("sweep", title=folder.name, root=str(self.folder), **pages.sweep(folder))

    def data(self, request: Request) -> Response:
        """The rows of a run."""
        run = self._run(request.path_params["place"])
        answer = self.inspected.answer(run)
        shown = pages.data(answer) if isinstance(answer, dict) else {"found": None, "lengths": ""}
        message = answer if isinstance(answer, str) else ""
        return self._show("data", title="Data", place=request.path_params["place"], message=message, **shown)

    def feedback(self, request: Request) -> Response:
        """What there is to vote on, and what the votes say."""
        return self._show("feedback", title="Feedback", **self.booth.overview(self._visible))

    def vote(self, request: Request) -> Response:
        """The next two answers."""
        return self._show("vote", title="Vote", **self.booth.next(request.query_params, self._visible))

    def _visible(self, author: str) -> bool:
        """Whether an author's answers may be shown."""
        config = Run(self.folder / author.removesuffix("/base")).config
        return self.show_private or not (config and config.get("private"))

    def cycle(self, request: Request) -> Response:
        """What to train next."""
        return self._show(
            "cycle", title="Next cycle", **self.cycles.form(self.store, request.query_params.get("run", ""))
        )

    def checked(self, request: Request) -> Response:
        """A cycle that is being checked, or can be started."""
        return self._show("checked", title="Next cycle", **self.cycles.checked(request.path_params["number"]))

    def jobs(self, request: Request) -> Response:
        """The queue."""
        return self._show("jobs", title="Jobs", jobs=self.queue.jobs())

    def job(self, request: Request) -> Response:
        """A job and what it printed."""
        job = self.queue.job(request.path_params["number"])
        if not job:
            raise HTTPException(404, "There is no such job.")
        log, run = self.queue.log(job.number), self.queue.run_of(job)
        text = log.read_text(errors="replace")[-20_000:] if log.is_file() else ""
        place = str(run.folder.relative_to(self.folder)) if run and run.folder.is_relative_to(self.folder) else None
        return self._show(
            "job", title=job.title, job=job, log=text.replace("\r", "\n").splitlines()[-200:], place=place
        )

    # Forms.

    def stop(self, form: Form) -> str:
        """Let a run save what it has and end."""
        import psutil

        run = self._run(form.get("place", ""))
        if not run.process:
            raise HTTPException(409, "No process of this machine is in this run.")
        psutil.Process(run.process).terminate()
        return f"/runs/{form['place']}"

    def resume(self, form: Form) -> str:
        """Go on with a run that was stopped."""
        run = self._run(form.get("place", ""))
        if run.process or run.finished:
            raise HTTPException(409, "This run is not stopped.")
        return f"/jobs/{self.queue.add('train', f'go on with {run.name}', [f'resume={run}']).number}"

    def delete(self, form: Form) -> str:
        """Delete a run, which was confirmed."""
        run = self._run(form.get("place", ""))
        if run.process:
            raise HTTPException(409, "A process is in this run: stop it first.")
        if form.get("sure") != "yes":
            raise HTTPException(422, "Tick the box that says that you are sure.")
        shutil.rmtree(run.folder)
        return "/"

    def write_answers(self, form: Form) -> str:
        """Let a run's model write answers, in the background."""
        run = self._run(form.get("run", ""))
        return f"/jobs/{self.booth.write_answers(run, int(form.get('count', '40') or 40)).number}"

    def check_cycle(self, form: Form) -> str:
        """Check a cycle that was asked for."""
        run = None if form.get("run") == FOUNDATION else self._run(form.get("run", ""))
        return f"/cycle/{self.cycles.check(run, form)}"

    def stop_job(self, form: Form) -> str:
        """Take a job out of the queue, or end it."""
        number = int(form["number"]) if form.get("number", "").isdigit() else 0
        self.queue.stop(number)
        return f"/jobs/{number}"


def _file(path: Path) -> Callable[[Request], Response]:
    return lambda request: FileResponse(path)
