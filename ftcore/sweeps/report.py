"""The answer of a sweep: a table and sweep.json. Seeds are averaged.

The best two settings are compared over the held-out rows that both were scored on (evaluate/intervals.py).
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from ftcore.config.build import build
from ftcore.console import plain, wide_console
from ftcore.evaluate.intervals import Better, Interval, interval
from ftcore.files import write_json
from ftcore.run_folder import RowScore
from ftcore.settings import Config
from ftcore.sweeps.job import Job

# What the table shows of a run: title -> keys of summary.json, two of them as "base -> tuned".
COLUMNS = {
    "loss": ("base.loss", "tuned.loss"),
    "accuracy": ("base.accuracy", "tuned.accuracy"),
    "reward": ("base.reward", "tuned.reward"),
    "forgotten": ("probe_perplexity_rise",),
    "s": ("seconds",),
    "tok/s": ("tokens_per_second",),
    "GB": ("peak_memory_gb",),
}


@dataclass
class Setting:
    """Finished jobs that differ in the seed only: what they change, mean and standard deviation of the objective."""

    setting: dict[str, str]
    jobs: list[Job]
    mean: float
    std: float | None

    def __str__(self) -> str:
        return ", ".join(f"{key}={_short(word)}" for key, word in self.setting.items()) or "as it is"


def finish(config: Config, folder: Path, jobs: list[Job], columns: tuple[str, ...]) -> None:
    """Print the table and the winner; write sweep.json. Verbs with `columns` of their own get the table alone."""
    console = wide_console()
    answer: dict[str, object] = {"jobs": [_as_json(job) for job in jobs]}
    if columns:
        console.print(_table(jobs, {key: (key,) for key in columns}))
        write_json(folder / "sweep.json", answer)
    else:
        objective, direction = config["sweep"]["objective"], config["sweep"]["direction"]
        ranked = sorted(_settings(jobs, objective), key=lambda one: one.mean, reverse=direction == "maximize")
        known = {key for keys in COLUMNS.values() for key in keys}
        console.print(_table(jobs, ({} if objective in known else {objective: (objective,)}) | COLUMNS))
        if any(len(one.jobs) > 1 for one in ranked):
            console.print(_settings_table(ranked, objective))
        console.print(verdict := _verdict(ranked, objective, direction))
        comparable, better = not _unlike(ranked, objective), _better(direction)
        behind = [_paired(one, ranked[0], objective, better)[1] if one is not ranked[0] else None for one in ranked]
        settings = [
            vars(one) | {"jobs": [job.number for job in one.jobs], "behind": found if comparable else None}
            for one, found in zip(ranked, behind, strict=True)
        ]
        answer |= {"objective": objective, "direction": direction, "verdict": verdict, "comparable": comparable}
        answer |= {"settings": settings}
        write_json(folder / "sweep.json", answer)
        _tell_wandb(config, folder, jobs, verdict)
    plain.print(f"Everything is in {folder}")


def _as_json(job: Job) -> dict[str, object]:
    texts = ("samples", "hardest")  # they stay in its folder
    summary = {key: value for key, value in (job.summary or {}).items() if key not in texts}
    place = {"folder": str(job.folder), "summary": summary}
    return {"job": job.number, "changes": job.changes, "state": job.state, **place}


def _settings(jobs: list[Job], objective: str) -> list[Setting]:
    groups = defaultdict(list)
    for job in jobs:
        if job.score(objective) is not None:
            groups[json.dumps({key: word for key, word in job.changes.items() if key != "seed"})].append(job)
    settings = []
    for setting, members in groups.items():
        scores = [job.score(objective) or 0.0 for job in members]
        std = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
        settings.append(Setting(json.loads(setting), members, float(np.mean(scores)), std))
    return settings


def _verdict(ranked: list[Setting], objective: str, direction: str) -> str:
    """Who is best, and whether the second could as well be."""
    if not ranked:
        return f"No finished job has {objective}."
    if len(ranked) == 1:
        return f"{objective}: {ranked[0].mean:.4g} ({ranked[0]})."
    best, second, *_ = ranked
    if groups := _unlike(ranked, objective):
        return (
            f"{objective} cannot rank settings of different {' or '.join(sorted(groups))}: choose what they share, such as "
            "sweep.objective=tuned.accuracy."
        )
    verdict = f"Best by {objective}: {best} ({best.mean:.4g}); next {second} ({second.mean:.4g})."
    paired_by, found = _paired(best, second, objective, _better(direction))
    if not found:
        return f"{verdict} One run says little about chance: sweep over seeds too."
    said = "better than the next" if found["verdict"] == "better" else "not decided"
    needed = f" (about {found['rows_needed']:,} would decide a difference of this size)" if found["rows_needed"] else ""
    return f"{verdict} The difference over {paired_by}: {found['low']:+.3g} to {found['high']:+.3g} (95 %), {said}{needed}."


def _unlike(ranked: list[Setting], objective: str) -> set[str]:
    """The groups by which settings differ so that their objective says nothing of which is better: losses of other rows."""
    varied = {key for one in ranked for key, word in one.setting.items() if word != ranked[0].setting.get(key)}
    return varied & {"method", "data"} if objective.endswith(".loss") else set()


def _better(direction: str) -> Better:
    return "higher" if direction == "maximize" else "lower"


def _paired(best: Setting, second: Setting, objective: str, better: Better) -> tuple[str, Interval | None]:
    """What two settings are paired by, and the interval of the best minus the second: the held-out rows that all their
    models were scored on, else the seeds that both have."""
    before, after = _by_row(second, objective), _by_row(best, objective)
    if before and after and (found := interval(before, after, better)):
        return f"{sum(map(bool, before[0]['counts'][0]))} held-out rows", found
    seeds = sorted({*map(_seed, best.jobs)} & {*map(_seed, second.jobs)})
    before, after = _by_seed(second, objective, seeds), _by_seed(best, objective, seeds)
    return f"{len(seeds)} seeds", interval(before, after, better) if len(seeds) > 1 else None


def _by_row(setting: Setting, objective: str) -> list[RowScore]:
    """The objective of each job by held-out row; [] if one has none."""
    side, _, name = objective.partition(".")
    runs = [run for job in setting.jobs for run in job.runs if run.finished]
    found = [score for run in runs if (score := run.row_scores().get(name))] if side == "tuned" else []
    return found if len(found) == len(runs) else []


def _by_seed(setting: Setting, objective: str, seeds: list[str]) -> list[RowScore]:
    """The objective of a setting with a seed in the place of each row."""
    scores = {_seed(job): job.score(objective) or 0.0 for job in setting.jobs}
    sums, counts = [scores[seed] for seed in seeds], [1.0] * len(seeds)
    return [RowScore(rows="seeds", sums=[sums], counts=[counts], exponential=False)]


def _seed(job: Job) -> str:
    return job.changes.get("seed", "")


def _changed(jobs: list[Job]) -> list[str]:
    """The keys that the jobs change."""
    return list(dict.fromkeys(key for job in jobs for key in job.changes))


def _table(jobs: list[Job], titles: dict[str, tuple[str, ...]]) -> Table:
    """A line for each job; those that failed say why."""
    changed = _changed(jobs)
    shown = {title: keys for title, keys in titles.items() if any(job.score(keys[-1]) is not None for job in jobs)}
    numbers = (Column(title, justify="right", no_wrap=True) for title in shown)
    table = Table("job", *changed, *numbers, Column("state", overflow="fold"))
    for job in jobs:
        words = [_short(job.changes.get(key, "")) for key in changed]
        scores = [" -> ".join(_score(job.score(key)) for key in keys) if job.summary else "" for keys in shown.values()]
        table.add_row(str(job.number), *words, *scores, Text(job.state, style="" if job.summary else "red"))
    return table


def _settings_table(settings: list[Setting], objective: str) -> Table:
    """A line for each setting, its seeds averaged."""
    numbers = (Column(title, justify="right") for title in ("seeds", f"{objective}, mean", "standard deviation"))
    table = Table("setting", *numbers, title="seeds together", title_justify="left")
    for one in settings:
        table.add_row(str(one), str(len(one.jobs)), f"{one.mean:.4g}", _score(one.std))
    return table


def _score(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _short(word: str) -> str:
    """A number in four digits, other words as they are."""
    number = _number(word)
    return f"{number:.4g}" if isinstance(number, float) else word


def _number(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


def _tell_wandb(config: Config, folder: Path, jobs: list[Job], verdict: str) -> None:
    """One more run in the jobs' group, with their table and who was best."""
    if not config["logger"] or "group" not in config["logger"]:
        return
    import wandb

    from ftcore.train.loggers import wandb_hint

    objective, changed = config["sweep"]["objective"], _changed(jobs)
    rows = [[job.number, *map(job.changes.get, changed), job.score(objective), job.state] for job in jobs]
    table = wandb.Table(columns=["job", *changed, objective, "state"], data=rows)
    settings = {**config["logger"], "group": config["logger"]["group"] or folder.name}
    logger = build(settings, list, folder, config)[0]  # W&B's comes first; others write nothing before they are used
    try:
        logger.experiment.log({"jobs": table})
        logger.experiment.summary.update({"verdict": verdict, "failed": sum(job.state != "done" for job in jobs)})
        hint = wandb_hint(logger)
        logger.experiment.finish()
        plain.print(hint)
    except Exception as error:  # of wandb, requests or its service: there is no common class
        plain.print(f"W&B: {type(error).__name__}; the answer is in {folder / 'sweep.json'}.")
