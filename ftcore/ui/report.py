"""The pages of a run, a sweep and of data as one HTML file each, to keep or to send: no script, nothing from elsewhere."""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftcore.console import plain
from ftcore.errors import ConfigError
from ftcore.files import write_text
from ftcore.run_folder import Run
from ftcore.settings import Config
from ftcore.ui import pages

NAME = "report.html"
MOST = 100  # samples


def report(config: Config) -> dict[str, object]:
    """Write report.html into the folder of the run or sweep that `run=` names. Raises `ConfigError` when it is none."""
    if not config["run"]:
        raise ConfigError("`report` needs run=<folder of a run>, such as run=runs/<name>/<time>.")
    file = of_run(Run(config["run"]))
    plain.print(f"Report: {file}")
    return {"report": str(file)}


def of_finished(run: Run) -> Path | None:
    """Write the page of a run that has ended; None for one that goes on elsewhere."""
    return of_run(run) if run.summary is not None else None


def of_run(run: Run) -> Path:
    """Write the page of a run."""
    folder = run.folder.parents[1]
    context = pages.one_run(run, folder, {})
    shown = pages.samples(run.samples(), {"q": "", "show": "changed", "page": "1"}, MOST)
    return _write(run.folder / NAME, "run", title=run.folder.name, **{**context, "samples": shown})


def of_sweep(folder: Path) -> Path:
    """Write the page of a sweep."""
    return _write(folder / NAME, "sweep", title=folder.name, **pages.sweep(folder))


def of_data(answer: Mapping[str, Any]) -> Path:
    """Write what `inspect` found into the working directory."""
    file = Path(f"inspect-{str(answer['name']).replace('/', '-')}.html").resolve()
    return _write(file, "data", title="Data", place="", message="", **pages.data(answer))


def _write(file: Path, name: str, /, **context: Any) -> Path:
    style = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = pages.templates().get_template(f"{name}.html")
    write_text(file, page.render(static=True, style=pages.Markup(style), style_hash=f"sha256-{digest}", **context))
    return file
