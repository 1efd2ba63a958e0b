"""The answer of a sweep: a table, sweep.json, and sweep.html with a plot for each swept key. Seeds are put together.

Two settings are compared over the same held-out rows: differences of single rows are drawn again and again with replacement
(paired bootstrap, Efron and Tibshirani 1993); when the interval of their mean holds zero it is a tie.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftcore.config.build import build
from ftcore.files import write_json
from ftcore.run_folder import Run, Summary
from ftcore.settings import Config
from ftcore.sweeps.job import Job

# What is shown of a job: title -> keys of summary.json, two of them as "base -> tuned".
COLUMNS = {
    "loss": ("base.loss", "tuned.loss"),
    "accuracy": ("base.accuracy", "tuned.accuracy"),
    "reward": ("base.reward", "tuned.reward"),
    "forgotten": ("probe_perplexity_rise",),
    "s": ("seconds",),
    "tok/s": ("tokens_per_second",),
    "GB": ("peak_memory_gb",),
}
DRAWS = 2_000


def finish(config: Config, folder: Path, jobs: list[Job], failed: dict[int, str], columns: tuple[str, ...]) -> None:
    """Print the table and the winner; write sweep.json and sweep.html. Of verbs with `columns` of their own the table alone."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    rows = [_row(job, failed) for job in jobs]
    if columns:
        console.print(_table(rows, {key: (key,) for key in columns}))
        write_json(folder / "sweep.json", {"jobs": rows})
        return
    objective, least = config["sweep"]["objective"], config["sweep"]["direction"] == "minimize"
    groups = by_setting(rows, objective)
    ranked = sorted(groups, key=lambda group: group["mean"] if least else -group["mean"])
    verdict = _verdict(ranked, rows, objective)
    console.print(_table(rows, _columns(objective)))
    if any(len(group["jobs"]) > 1 for group in groups):
        console.print(_groups_table(ranked, objective))
    console.print(verdict)
    answer = {"objective": objective, "direction": config["sweep"]["direction"], "verdict": verdict, "settings": ranked}
    write_json(folder / "sweep.json", {**answer, "jobs": rows})
    page = _plots(rows, objective, folder)
    _tell_wandb(config, folder, rows, verdict, objective)
    console.print(f"Everything is in {folder}" + (f"\nPlots: {page}" if page else ""), soft_wrap=True, highlight=False)


def _row(job: Job, failed: dict[int, str]) -> dict[str, Any]:
    summary = Summary(job.result or {})
    summary.pop("samples", None)  # texts stay in the job's own folder
    state = (
        "done" if job.result is not None else failed.get(job.number, "with SLURM" if job.submitted else "ended early")
    )
    return {"job": job.number, "changes": job.changes, "state": state, "folder": str(job.folder), "summary": summary}


def by_setting(rows: list[dict[str, Any]], objective: str) -> list[dict[str, Any]]:
    """Finished jobs that differ in the seed only, put together: mean and standard deviation of the objective."""
    groups = defaultdict(list)
    for row in rows:
        if row["summary"].score(objective) is not None:
            setting = {key: word for key, word in row["changes"].items() if key != "seed"}
            groups[json.dumps(setting)].append(row)
    return [
        {
            "setting": json.loads(setting),
            "jobs": [row["job"] for row in members],
            "mean": float(np.mean(found := [row["summary"].score(objective) for row in members])),
            "std": float(np.std(found, ddof=1)) if len(found) > 1 else None,
        }
        for setting, members in groups.items()
    ]


def _verdict(ranked: list[dict[str, Any]], rows: list[dict[str, Any]], objective: str) -> str:
    """Who is best, and whether the second could as well be."""
    if not ranked:
        return f"No finished job has {objective}."
    if objective.endswith(".loss") and (groups := _varied(ranked) & {"method", "data"}):
        return (
            f"{objective} of one {' or '.join(sorted(groups))} says nothing beside another's: choose what they share, such as "
            "sweep.objective=tuned.accuracy."
        )
    best = _named(ranked[0]["setting"])
    if len(ranked) == 1:
        return f"{objective}: {ranked[0]['mean']:.4g} ({best})."
    second = _named(ranked[1]["setting"])
    said = f"Best by {objective}: {best} ({ranked[0]['mean']:.4g}); next {second} ({ranked[1]['mean']:.4g})."
    over, differences = _differences(ranked[0], ranked[1], rows, objective)
    if len(differences) < 3:
        return f"{said} One run says little about chance: sweep over seeds too."
    low, high = paired_bootstrap(differences)
    what = "a tie" if low <= 0 <= high else "no tie"
    return f"{said} The difference over {len(differences)} {over}: {low:+.3g} to {high:+.3g} (95 %), {what}."


def _varied(ranked: list[dict[str, Any]]) -> set[str]:
    """Keys in which settings differ."""
    return {key for group in ranked for key, word in group["setting"].items() if word != ranked[0]["setting"].get(key)}


def _differences(one: Any, other: Any, rows: list[dict[str, Any]], objective: str) -> tuple[str, list[float]]:
    """What two settings are paired by, and their differences: held-out rows for accuracy, else seeds."""
    if objective == "tuned.accuracy":
        right, others = _answers(rows, one["jobs"]), _answers(rows, other["jobs"])
        return "held-out rows", [right[row] - others[row] for row in sorted(right.keys() & others.keys())]
    by_seed = [
        {row["changes"].get("seed"): row["summary"].score(objective) for row in rows if row["job"] in group["jobs"]}
        for group in (one, other)
    ]
    shared = sorted(by_seed[0].keys() & by_seed[1].keys(), key=str)
    return "seeds", [by_seed[0][seed] - by_seed[1][seed] for seed in shared]


def _answers(rows: list[dict[str, Any]], jobs: list[int]) -> dict[str, float]:
    """Held-out question -> how often these jobs' tuned models answered it rightly, of those with a checkable answer."""
    found = defaultdict(list)
    for row in rows:
        if row["job"] in jobs:
            for run in Run.named(Path(row["folder"]))[:1]:
                for line in run.samples():
                    if line.get("tuned_right") is not None:
                        found[str(line.get("prompt") or line["id"])].append(float(bool(line["tuned_right"])))
    return {row: float(np.mean(right)) for row, right in found.items()}


def paired_bootstrap(differences: list[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of `differences`, rows drawn with replacement from a fixed seed.

    >>> paired_bootstrap([0.0, 0.0])
    (0.0, 0.0)
    """
    values = np.array(differences)
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _named(setting: dict[str, str]) -> str:
    return ", ".join(f"{key}={_short(word)}" for key, word in setting.items()) or "as it is"


def _short(word: str) -> str:
    """A number in four digits, other words as they are."""
    number = _number(word)
    return f"{number:.4g}" if isinstance(number, float) else word


def _columns(objective: str) -> dict[str, tuple[str, ...]]:
    """What is shown of runs: the objective, where it is none of the usual columns, and these."""
    known = {key for names in COLUMNS.values() for key in names}
    return ({} if objective in known else {objective: (objective,)}) | COLUMNS


def _table(rows: list[dict[str, Any]], titles: dict[str, tuple[str, ...]]) -> Table:
    """A line for each job; those that failed say why."""
    table = Table()
    keys = list(dict.fromkeys(key for row in rows for key in row["changes"]))
    titles = {t: names for t, names in titles.items() if any(r["summary"].score(names[-1]) is not None for r in rows)}
    for title in ("job", *keys):
        table.add_column(title)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("state", overflow="fold")
    for row in rows:
        numbers = [" -> ".join(_shown(row["summary"].score(key)) for key in names) for names in titles.values()]
        state = row["state"] if row["state"] == "done" else Text(row["state"], style="red")
        numbers = [text if row["summary"] else "" for text in numbers]
        table.add_row(str(row["job"]), *(_short(row["changes"].get(key, "")) for key in keys), *numbers, state)
    return table


def _groups_table(groups: list[dict[str, Any]], objective: str) -> Table:
    """A line for each setting, its seeds put together."""
    table = Table(title="seeds together", title_justify="left")
    for title in ("setting", "seeds", f"{objective}, mean", "standard deviation"):
        table.add_column(title, justify="left" if title == "setting" else "right")
    for group in groups:
        spread = "" if group["std"] is None else f"{group['std']:.3g}"
        table.add_row(_named(group["setting"]), str(len(group["jobs"])), f"{group['mean']:.4g}", spread)
    return table


def _shown(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _tell_wandb(config: Config, folder: Path, rows: list[dict[str, Any]], verdict: str, objective: str) -> None:
    """One more run in the jobs' group, with their table and who was best."""
    if not config["logger"] or "group" not in config["logger"]:
        return
    import wandb

    from ftcore.train.loggers import wandb_hint

    keys = list(dict.fromkeys(key for row in rows for key in row["changes"]))
    table = wandb.Table(columns=["job", *keys, objective, "state"])
    for row in rows:
        changes = [row["changes"].get(key) for key in keys]
        table.add_data(row["job"], *changes, row["summary"].score(objective), row["state"])
    settings = {**config["logger"], "group": config["logger"]["group"] or folder.name}
    logger = build(settings, list, folder, config)[0]  # W&B's comes first; others write nothing before they are used
    try:
        logger.experiment.log({"jobs": table})
        logger.experiment.summary.update({"verdict": verdict, "failed": sum(row["state"] != "done" for row in rows)})
        hint = wandb_hint(logger)
        logger.experiment.finish()
        print(hint)
    except Exception as error:  # of wandb, requests or its service: there is no common class
        print(f"W&B: {type(error).__name__}; the answer is in {folder / 'sweep.json'}.")


def _plots(rows: list[dict[str, Any]], objective: str, folder: Path) -> Path | None:
    """sweep.html: the objective against each swept key, and parallel coordinates for several; None without plotly."""
    done = [row for row in rows if row["summary"].score(objective) is not None]
    keys = list(dict.fromkeys(key for row in done for key in row["changes"]))
    try:
        import plotly.graph_objects as go
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    scores = [row["summary"].score(objective) for row in done]
    figures = []
    for key in keys:
        words = [_number(row["changes"].get(key, "")) for row in done]
        figure = go.Figure(go.Scatter(x=words, y=scores, mode="markers", text=[f"job {row['job']}" for row in done]))
        figures.append(figure.update_layout(title=key, xaxis_title=key, yaxis_title=objective))
    if len(keys) > 1 and done:
        axes = [_axis(key, [row["changes"].get(key, "") for row in done]) for key in keys]
        axes.append({"label": objective, "values": scores})
        figures.append(go.Figure(go.Parcoords(line={"color": scores, "showscale": True}, dimensions=axes)))
    body = "".join(figure.to_html(full_html=False, include_plotlyjs=False) for figure in figures)
    page = f"<!doctype html><meta charset='utf-8'><title>{folder.name}</title><script>{get_plotlyjs()}</script>{body}"
    (folder / "sweep.html").write_text(page, encoding="utf-8")
    return folder / "sweep.html"


def _axis(key: str, words: list[str]) -> dict[str, Any]:
    """An axis of parallel coordinates: numbers as they are, words at even distances."""
    numbers = [_number(word) for word in words]
    if all(isinstance(number, float) for number in numbers):
        return {"label": key, "values": numbers}
    names = sorted(set(words))
    places = {"tickvals": list(range(len(names))), "ticktext": names}
    return {"label": key, "values": [names.index(word) for word in words], **places}


def _number(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word
