"""What a person sees of a plan."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ftcore.plan.advice import Advice
from ftcore.plan.cards import MARGIN, Card, Cost, cost, largest_micro_batch
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
    numbers = ["GB", f"x {MARGIN} is", "rows at once", "hours", "kWh", *(["price"] if rate else [])]
    table = Table("card", "", *(Column(name, justify="right") for name in numbers))
    for card in cards:
        verdict, rows = card.verdict_of(most), largest_micro_batch(run, card)
        costs = _costs(cost(run, card, rate), rate) if verdict in ("fits", "tight") else []
        share = f"{most.gb * MARGIN / card.memory_gb:.0%}"
        shown = Text(verdict, style=STYLES.get(verdict, "red"))
        table.add_row(card.name, shown, f"{card.memory_gb:g}", share, str(rows or ""), *costs)
    return table


def _costs(cost: Cost | None, rate: float | None) -> list[str]:
    if not cost:
        return []
    spans = [cost.hours, cost.kwh, *([cost.price] if rate else [])]
    return [f"{span[0]:,.3g} to {span[1]:,.3g}" if span else "" for span in spans]


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
    seconds: float | None,
    notes: Sequence[str],
) -> Group:
    """All of it. `seconds`: what the steps take here, where they were tried; `notes`: what has to be known."""
    most, parts = largest(plans), list[RenderableType]([overview(name, plans), phases(plans)])
    parts += [fits(most, plans["run"], cards, rate)]
    parts += [changes(advised, cards[0] if len(cards) == 1 else None)] if advised else []
    parts += (
        [f"All steps on this machine: about {seconds / 60:,.1f} min (three were run, on random weights)."]
        if seconds
        else []
    )
    return Group(*parts, *(f"notice: {note}" for note in notes))
