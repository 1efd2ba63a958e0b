"""`plan`: what a run needs, before it runs and without the machine that it is for."""

import math
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, cast

from ftcore.config.compose import load_config
from ftcore.config.options import options
from ftcore.console import quiet, stderr, wide_console
from ftcore.errors import ConfigError, DoesNotFit
from ftcore.machine.hardware import cuda_devices
from ftcore.plan import tables
from ftcore.plan.advice import Advice, advice, fitting
from ftcore.plan.cards import PROCESS, Card, card_of, cards, cost, largest_micro_batch, margin, this_card, this_machine
from ftcore.plan.planner import Plan, Planner, largest
from ftcore.run_folder import Run
from ftcore.runs.resolve import resolve, settle_precision
from ftcore.settings import Config


def plan(config: Config) -> dict[str, object]:
    """Say what a run of this config needs on each device, where it fits, how long it takes and what would need less.

    With `run=`, also what that run really took. Raises `DoesNotFit`, with the answer, where it fits on nothing it is held
    against, and whatever a run would raise before it loads a model.
    """
    asked = config["plan"]
    with ExitStack() as stack:
        planner, plans, against = _planned(config, stack)
        most = largest(plans)
        fits = any(card.verdict_of(most) == "fits" for card in against)
        advised = [] if fits else list(advice(planner, most, lambda words: stderr.print(f"Planning {words} ...")))
        seconds = planner.measured(plans["run"]) if fits and most.resolved.machine.accelerator == "cpu" else None
    real = Run(config["run"]).summary if config["run"] else None
    answer = _answer(plans, against, advised, asked["rate"], seconds, real.score("peak_memory_gb") if real else None)
    page = tables.page(config["name"], plans, against, advised, asked["rate"], [*tables.ends(answer), *planner.notes])
    wide_console().print(page)
    if not fits:
        raise DoesNotFit(_why(most, against, advised), answer)
    return answer


def show(config: Config) -> None:
    """Print the plan of a config alone: nothing is tried that would need less, or measured."""
    with ExitStack() as stack:
        planner, plans, against = _planned(config, stack)
        wide_console().print(tables.page(config["name"], plans, against, [], None, [*planner.notes]))


def _planned(config: Config, stack: ExitStack) -> tuple[Planner, dict[str, Plan], list[Card]]:
    """The plans of a config, and the cards that they are held against."""
    quiet()
    target = config["plan"]["target"]
    if target and config["choices"]["hardware"] == "auto":
        return *_fewest(config, card_of(target), stack), [card_of(target)]
    settle_precision(config, elsewhere=True)
    planner = Planner(config, stack)
    card = card_of(target) if target else _own(config)
    return planner, fitting(planner, card) if card else planner.plan(), [card] if card else cards()


def _own(config: Config) -> Card | None:
    """This machine's own memory or card, if that is what the config asks for; None where it has no such card."""
    if resolve(config, {}, elsewhere=True).machine.accelerator == "cpu":
        return this_machine()
    return this_card() if cuda_devices() else None


def _fewest(config: Config, card: Card, stack: ExitStack) -> tuple[Planner, dict[str, Plan]]:
    """The plan on the shipped hardware option with the fewest GPUs that fit, or with a rate the cheapest; else on the last."""
    nodes = {name: load_config([f"hardware={name}"])["hardware"] for name in options("hardware")}
    gpus = {name: node["devices"] * node["num_nodes"] for name, node in nodes.items() if node["accelerator"] == "gpu"}
    found: list[tuple[float, Planner, dict[str, Plan]]] = []
    for name in sorted(gpus, key=lambda name: (gpus[name], nodes[name]["strategy"] == "fsdp")):
        if nodes[name]["slurm"]:
            continue
        changed = {"hardware": dict(nodes[name]), "choices": {**config["choices"], "hardware": name}}
        variant = cast(Config, {**config, **changed})
        settle_precision(variant, elsewhere=True)
        planner = Planner(variant, stack)
        try:
            most = largest(plans := fitting(planner, card))
        except ConfigError as error:  # rows that cannot be dealt to so many, an adapter that cannot be sharded
            stderr.print(f"hardware={name}: {error}")
            continue
        stderr.print(f"hardware={name}: {most.gb:.2f} GB on each device, {card.verdict_of(most)}")
        taken = cost(plans["run"], card, config["plan"]["rate"])
        price = taken.price[0] if taken and taken.price else 0.0
        found.append((price if card.verdict_of(most) == "fits" else math.inf, planner, plans))
        if found[-1][0] == 0.0:
            break
    if not found:
        raise ConfigError("No shipped hardware option takes this config: see above.")
    return min(reversed(found), key=lambda one: one[0])[1:]


def _answer(
    plans: dict[str, Plan],
    against: list[Card],
    advised: list[Advice],
    rate: float | None,
    seconds: float | None,
    real: float | None,
) -> dict[str, Any]:
    """The numbers of the page, in GB of 10^9 bytes for one device; `seconds` were measured, `real` GB the run took."""
    most, run = largest(plans), plans["run"]
    held = most.need.phases[most.need.phase]
    return {
        "peak_gb": most.gb,
        "phase": most.need.phase,
        "kind": max(held, key=lambda kind: held[kind]),
        "phases": _phases(plans),
        "host_gb": run.host / 1e9 + run.resolved.machine.devices * PROCESS,
        "hardware": run.config["choices"]["hardware"],
        "devices": run.resolved.machine.processes,
        "precision": run.resolved.machine.precision,
        "micro_batch_size": run.micro_batch_size,
        "activation_checkpointing": run.checkpointing,
        "parameters": run.parameters[0],
        "parameters_trained": run.parameters[1],
        "steps": run.work.steps,
        "tokens": run.work.tokens,
        "flops": run.flops,
        "fits": {card.name: card.verdict_of(most) for card in against},
        "micro_batch_sizes": {card.name: largest_micro_batch(run, card) for card in against},
        "costs": {card.name: asdict(taken) for card in against if (taken := cost(run, card, rate))},
        "seconds_measured": seconds,
        "real_peak_gb": real,
        "advice": [{"words": one.words, "peak_gb": one.plan.gb} for one in advised],
    }


def _phases(plans: dict[str, Plan]) -> dict[str, dict[str, float]]:
    named = {"" if name == "run" else f"{name} ": plan.need.phases for name, plan in plans.items()}
    return {
        name + phase: {kind: size / 1e9 for kind, size in kinds.items()}
        for name, found in named.items()
        for phase, kinds in found.items()
    }


def _why(plan: Plan, against: list[Card], advised: list[Advice]) -> str:
    """Why a plan does not fit, and what would need less."""
    where = f"{against[0].name} ({against[0].memory_gb:g} GB)" if len(against) == 1 else "any card of the table"
    words = f"{plan.gb:.1f} GB on each device ({plan.need.phase}), times {margin(plan)}, do not fit on {where}."
    less = min(advised, key=lambda one: one.plan.gb, default=None)
    return f"{words} The least that was found: {less.plan.gb:.1f} GB with {less.words}." if less else words
