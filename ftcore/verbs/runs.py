"""`runs`: all runs below `output_dir`, each below what it was made from, with their scores."""

from dataclasses import asdict

from rich.table import Column, Table
from rich.text import Text

from ftcore.console import plain, wide_console
from ftcore.evaluate.history import Change, Entry, history
from ftcore.evaluate.tables import change_text, verdict
from ftcore.evaluate.win_rate import WinRate
from ftcore.files import expanded
from ftcore.settings import Config


def runs(config: Config) -> dict[str, object]:
    """Print the runs as a tree of cycles: method, rows, base against tuned, what was forgotten, people's votes, time."""
    folder = expanded(config["output_dir"])
    found = history(folder)
    if not found:
        plain.print(f"There is no run below {folder}. Begin with: python -m ftcore")
        return {"runs": []}
    names = ("rows", "base -> tuned", "change (95 % interval)", "verdict", "general text", "preferred to its base", "s")
    columns = (Column(name, justify="right", overflow="fold") for name in names)
    table = Table(Column("run", no_wrap=True, overflow="fold"), "method", *columns, "state")
    for entry in found:
        table.add_row(*map(Text, _cells(entry)))
    wide_console().print(table)
    return {"runs": [asdict(entry) for entry in found]}


def _cells(entry: Entry) -> list[str]:
    indent = "  " * (entry.depth - 1) + "└ " if entry.depth else ""
    change = entry.change
    return [
        f"{indent}{entry.place}",
        entry.method,
        f"{entry.rows:,}" if entry.rows is not None else "",
        f"{change.label} {change}" if change else "",
        change_text(change.key, change.base, change.tuned, change.interval) if change else "",
        verdict(change.interval) if change else "",
        _forgotten(entry.forgotten),
        wins_text(entry.wins),
        f"{entry.seconds:,.0f}" if entry.seconds is not None else "",
        entry.state,
    ]


def _forgotten(change: Change | None) -> str:
    return f"{change.tuned / change.base - 1:+.1%}" if change and change.base else ""


def wins_text(wins: WinRate | None) -> str:
    """A win-rate with its limits and what they mean."""
    if not wins or wins["rate"] is None:
        return ""
    more = f", about {wins['more']:,} votes more" if wins["more"] else ""
    return f"{wins['rate']:.0%} ({wins['low']:.0%} to {wins['high']:.0%}) of {wins['votes']}: {wins['verdict']}{more}"
