"""What to change so that a run needs less: each of it was planned, none is a guess."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ftcore.config.compose import load_config
from ftcore.errors import FtcoreError
from ftcore.machine.hardware import smaller
from ftcore.plan.cards import Card, largest_micro_batch
from ftcore.plan.planner import Plan, Planner, largest
from ftcore.settings import Config

Changes = Mapping[str, object]


@dataclass(frozen=True)
class Advice:
    """Words for the command line, and the plan with them."""

    words: str
    plan: Plan


def fitting(planner: Planner, card: Card) -> dict[str, Plan]:
    """The plans as a run would go on where a card is full: fewer rows at once, then checkpointing, where these are `auto`."""
    changes: dict[str, object] = {}
    plans = planner.plan()
    while card.verdict_of(largest(plans)) != "fits" and (less := _less(planner.config, plans["run"], changes, card)):
        changes |= less
        plans = planner.plan(changes)
    return plans


def _less(config: Config, run: Plan, changed: Changes, card: Card) -> Changes:
    """The next thing that a run would change by itself; nothing when there is none."""
    rows, processes = run.micro_batch_size, run.resolved.machine.processes
    lower = smaller(config["global_batch_size"], rows, processes)
    if config["micro_batch_size"] == "auto" and lower:
        return {"micro_batch_size": min(largest_micro_batch(run, card) or 1, lower)}
    key = "hardware.activation_checkpointing"
    if config["hardware"]["activation_checkpointing"] == "auto" and key not in changed:
        return {key: True, "micro_batch_size": config["micro_batch_size"]}
    return {}


def advice(planner: Planner, plan: Plan, tell: Callable[[str], None]) -> Iterator[Advice]:
    """Plans with what may need less, one change at a time; none where a change is refused. `tell` hears what is planned."""
    for words, changes in _candidates(plan):
        tell(words)
        try:
            yield Advice(words, largest(planner.plan(changes)))
        except FtcoreError:
            continue  # this config does not take it


def _candidates(plan: Plan) -> Iterator[tuple[str, Changes]]:
    """Changes that take memory from the phase in which the peak is, those that change no result first."""
    config, phase, machine = plan.config, plan.need.phase, plan.resolved.machine
    less = {"micro_batch_size": 1}
    if phase == "comparison":
        yield _one("evaluate.batch_size", max(config["evaluate"]["batch_size"] // 4, 1))
        if machine.strategy == "fsdp":
            yield _one("evaluate.enabled", False)
    if phase == "rollouts":
        yield _one("method.rollout_batch_size", max(plan.work.sampled // 4, 1))
    if plan.micro_batch_size > 1:
        yield _one("micro_batch_size", 1)
    if config["hardware"]["activation_checkpointing"] is not True:
        key = "hardware.activation_checkpointing"
        yield f"{key}=true micro_batch_size=1", {key: True, **less}
    if machine.accelerator == "gpu" and machine.strategy != "fsdp":
        yield "hardware=fsdp_8gpu micro_batch_size=1", {"hardware": _option("hardware", "fsdp_8gpu"), **less}
    if config["choices"]["adapter"] in ("full", "freeze"):
        yield "adapter=lora micro_batch_size=1", {"adapter": _option("adapter", "lora"), **less}
    if machine.accelerator == "gpu" and machine.strategy != "fsdp" and config["choices"]["adapter"] != "qlora":
        yield "adapter=qlora micro_batch_size=1", {"adapter": _option("adapter", "qlora"), **less}
    if machine.precision in ("32-true", "bf16-mixed") and machine.accelerator == "gpu":
        yield _one("hardware.precision", "bf16-true")


def _one(key: str, value: object) -> tuple[str, Changes]:
    return f"{key}={str(value).lower()}", {key: value}


def _option(group: str, name: str) -> object:
    """The node of another option of a group."""
    config: Config = load_config([f"{group}={name}"])
    return config[group]  # type: ignore[literal-required]
