"""What a person sees of a plan."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ftcore.plan.advice import Advice
from ftcore.plan.cards import Card, Cost, Span, cost, largest_micro_batch, margin, needed
from ftcore.plan.memory import Kind
from ftcore.plan.planner import Plan, largest

KINDS: tuple[Kind, ...] = ("weights", "gathered", "gradients", "optimizer", "activations", "temporary")
STYLES = {"fits": "green", "tight": "yellow", "does not fit": "red"}


def overview(name: str, plans: dict[str, Plan]) -> Table:
    """The run in words: model, machine, steps."""
    plan = plans["run"]
    machine, work, (parameters, trained) = plan.resolved.machine, plan.work, plan.parameters
    device = "CPU" if machine.accelerator == "cpu" else "GPU"
    table = Table(show_header=False, box=None, title=f"{name}: what it needs", title_justify="left", title_style="bold")
    table.add_row("model", f"{parameters:,} parameters, of which {trained:,} train; {machine.precision}")
    copies = f", {machine.replicas} copies" if machine.replicas > 1 else ""
    table.add_row("machine", f"{machine.processes} x {device}, {machine.strategy}{copies}")
    split = f"{work.accumulation} x {machine.processes} processes x {plan.micro_batch_size}"
    table.add_row(
        "steps",
        f"{work.steps:,} of {plan.config['global_batch_size']} rows = {split}; longest row {work.longest:,} tokens",
    )
    return table


def phases(plans: dict[str, Plan]) -> Table:
    """GB by kind in each phase of the run and of its stages."""
    columns = {
        " ".join(filter(None, (name if name != "run" else "", phase))): kinds
        for name, plan in plans.items()
        for phase, kinds in plan.need.phases.items()
    }
    peak = max(columns, key=lambda name: sum(columns[name].values()))
    headers = (Column(Text(name, style="bold" if name == peak else ""), justify="right") for name in columns)
    table = Table("GB on one device", *headers)
    for kind in KINDS:
        table.add_row(kind, *(f"{kinds[kind] / 1e9:.2f}" if kinds.get(kind) else "" for kinds in columns.values()))
    table.add_section()
    totals = {name: f"{sum(kinds.values()) / 1e9:.2f}" for name, kinds in columns.items()}
    table.add_row("peak", *(Text(total, style="bold" if name == peak else "") for name, total in totals.items()))
    return table


def fits(most: Plan, run: Plan, cards: Sequence[Card], rate: float | None) -> Table:
    """Each card: whether what needs `most` fits, about how many rows it takes in a forward pass, and what the run takes."""
    numbers = ["GB", f"x {margin(most)} is", "rows at once", "time", "kWh", *(["price"] if rate else [])]
    table = Table("card", "", *(Column(name, justify="right") for name in numbers))
    for card in cards:
        verdict, rows = card.verdict_of(most), largest_micro_batch(run, card)
        costs = _costs(cost(run, card, rate), rate) if verdict in ("fits", "tight") else []
        share = f"{needed(most) * margin(most) / card.memory_gb:.0%}"
        shown = Text(verdict, style=STYLES.get(verdict, "red"))
        table.add_row(card.name, shown, f"{card.memory_gb:g}", share, str(rows or ""), *costs)
    return table


def _costs(cost: Cost | None, rate: float | None) -> list[str]:
    if not cost:
        return []
    spans = [cost.kwh, *([cost.price] if rate else [])]
    return [_time(cost.hours), *(f"{span[0]:,.2g} to {span[1]:,.2g}" if span else "" for span in spans)]


def _time(hours: Span) -> str:
    """Hours in a unit that fits them.

    >>> _time((0.01, 0.02)), _time((30.0, 48.0))
    ('0.6 to 1.2 min', '30 to 48 h')
    """
    scale, unit = (1.0, "h") if hours[1] >= 1 else (60.0, "min")
    return f"{hours[0] * scale:,.2g} to {hours[1] * scale:,.2g} {unit}"


def changes(advised: Sequence[Advice], card: Card | None) -> Table:
    """What needs less, as it was planned."""
    table = Table("what needs less", Column("GB", justify="right"), "", title="each was planned", title_justify="left")
    for one in advised:
        verdict = card.verdict_of(one.plan) if card else ""
        table.add_row(one.words, f"{one.plan.gb:.2f}", Text(verdict, style=STYLES.get(verdict, "")))
    return table


def page(
    name: str,
    plans: dict[str, Plan],
    cards: Sequence[Card],
    advised: Sequence[Advice],
    rate: float | None,
    ends: Sequence[str],
) -> Group:
    """All of it; `ends` are lines that follow the tables."""
    parts: list[RenderableType] = [
        overview(name, plans),
        phases(plans),
        fits(largest(plans), plans["run"], cards, rate),
    ]
    parts += [changes(advised, cards[0] if len(cards) == 1 else None)] if advised else []
    return Group(*parts, *ends)


def ends(answer: Mapping[str, object]) -> Iterator[str]:
    """What was measured: the pace on this machine, and the memory of the run that was planned afterwards."""
    if seconds := answer["seconds_measured"]:
        yield f"All steps on this machine: about {seconds / 60:,.1f} min (three were run, on random weights)."  # type: ignore[operator]
    if real := answer["real_peak_gb"]:
        yield f"Planned {answer['peak_gb']:.2f} GB; the run's process took {real:.2f} GB with all that it had imported."
