"""The cards of gpus.yaml: what fits on which, how long a run takes there, what it costs."""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import yaml

from ftcore.config.check import closest
from ftcore.errors import ConfigError
from ftcore.files import PACKAGE
from ftcore.machine.hardware import memory_gb
from ftcore.plan.planner import Plan

Verdict = Literal["fits", "tight", "does not fit", "no bf16"]
# A plan counts tensors. CUDA's context, NCCL's buffers, workspaces and fragmentation come on top.
MARGIN = 1.25
# On a CPU the C library keeps what is freed, and its holes are not all used again (docs/plan.md has what was measured).
MARGIN_CPU = 1.7
# Shares of a card's peak that training reaches, and of its memory's bandwidth that generation does: at worst, at best.
COMPUTE, BANDWIDTH = (0.25, 0.40), (0.10, 0.60)
# Seconds that the host takes to start an operation: what bounds small models.
START = (20e-6, 5e-6)
# GB/s that a GPU can send to another machine: 400 Gb/s, less what is lost.
NETWORK = 40.0
# What a process holds in a machine's memory beside tensors, GB: Python and the libraries.
PROCESS = 1.0
Span = tuple[float, float]  # at best, at worst


@dataclass(frozen=True)
class Card:
    """A GPU, by its data sheet; or this machine, or so much memory, of which nothing else is known.

    Args:
        memory_gb: 10^9 bytes that a process can have.
        bf16_tflops: dense; None where it does not multiply bf16.
        fp32_tflops: without TF32.
        bandwidth_gbs: of its memory, 10^9 bytes/s.
        link_gbs: to another card of the machine, one way.
        watts: rated power.
    """

    name: str
    memory_gb: float
    bf16_tflops: float | None = None
    fp32_tflops: float | None = None
    bandwidth_gbs: float | None = None
    link_gbs: float | None = None
    watts: float | None = None
    source: str = ""

    def verdict_of(self, plan: Plan) -> Verdict:
        """Whether a plan fits, with the margin."""
        if self.fp32_tflops and not self.tflops(plan):
            return "no bf16"
        need = needed(plan)
        return (
            "fits" if need * margin(plan) <= self.memory_gb else "tight" if need <= self.memory_gb else "does not fit"
        )

    def tflops(self, plan: Plan) -> float | None:
        """The peak in the precision of a plan."""
        return self.fp32_tflops if plan.resolved.machine.precision == "32-true" else self.bf16_tflops


def margin(plan: Plan) -> float:
    """By how much more a device should have than a plan counts."""
    return MARGIN if plan.resolved.machine.accelerator == "gpu" else MARGIN_CPU


def needed(plan: Plan) -> float:
    """GB of what a plan is held against: a card holds one process, this machine all of its own with all they import."""
    machine = plan.resolved.machine
    return plan.gb if machine.accelerator == "gpu" else machine.devices * (plan.gb + PROCESS)


@cache
def cards() -> list[Card]:
    """All cards, in the order of the file."""
    content: dict[str, Any] = yaml.safe_load((PACKAGE / "plan" / "gpus.yaml").read_text(encoding="utf-8"))
    return [Card(name, **facts) for name, facts in content.items()]


def this_machine() -> Card:
    """The machine that this process runs on."""
    return Card("this machine", round(memory_gb(), 1))


def this_card() -> Card:
    """The first CUDA device of this machine, with what the table knows of one of its name."""
    import torch

    found = torch.cuda.get_device_properties(0)
    known = [card for card in cards() if all(word in _plain(found.name) for word in _plain(card.name).split("gb")[:1])]
    return replace(known[0] if known else Card("", 0), name=found.name, memory_gb=found.total_memory / 1e9)


def card_of(target: str) -> Card:
    """The card of this name, or one of so much memory: `80GB`. Raises `ConfigError` with the nearest name."""
    if found := re.fullmatch(r"(\d+(?:\.\d+)?) ?GB", target, re.IGNORECASE):
        return Card(target, float(found[1]))
    named = {_plain(card.name): card for card in cards()}
    for name, card in named.items():
        if _plain(target) and name.startswith(_plain(target)):
            return card
    names = [card.name for card in cards()]
    raise ConfigError(
        f"plan.target={target} is no card of the table{_meant(target, names)} Known: {', '.join(names)}; or its memory: 80GB."
    )


def _meant(target: str, names: list[str]) -> str:
    by_plain = {_plain(name): name for name in names}
    near = closest(_plain(target), by_plain)
    return next(
        (near.replace(repr(plain), repr(name)) for plain, name in by_plain.items() if repr(plain) in near), near
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]|rtx|nvidia|amd", "", name.lower())


@dataclass(frozen=True)
class Cost:
    """What the steps of a run take on all its cards: hours, kWh at rated power, and the price at a rate."""

    hours: Span
    kwh: Span | None
    price: Span | None


def cost(plan: Plan, card: Card, rate: float | None) -> Cost | None:
    """Time and cost of all steps on a card, at a `rate` per card and hour; None where its speed is not known."""
    tflops, processes = card.tflops(plan), plan.resolved.machine.processes
    if not tflops or not card.bandwidth_gbs or not card.link_gbs:
        return None
    computed, sending = (
        plan.flops / processes / (tflops * 1e12),
        plan.work.steps * _seconds_sending(plan, card.link_gbs),
    )
    decoded = _bytes_decoding(plan) / (card.bandwidth_gbs * 1e9)
    started = plan.work.steps * plan.work.accumulation * plan.need.operations
    worst, best = (
        max(computed / share, sending, started * start) + decoded / reached
        for share, reached, start in zip(COMPUTE, BANDWIDTH, START, strict=True)
    )

    def all_cards(per_hour: float) -> Span:
        return best / 3600 * processes * per_hour, worst / 3600 * processes * per_hour

    kwh = all_cards(card.watts / 1000) if card.watts else None
    return Cost((best / 3600, worst / 3600), kwh, all_cards(rate) if rate else None)


def _seconds_sending(plan: Plan, link: float) -> float:
    """Of a step, at the full speed of the links (GB/s): no run is faster. Copies of a model are each inside a machine."""
    machine, sent = plan.resolved.machine, plan.need.sent
    shares = link if machine.num_nodes in (1, machine.replicas) else min(link, NETWORK)
    sums = link if machine.num_nodes == 1 else min(link, NETWORK)
    gathered = plan.work.accumulation * (sent.get("gather", 0) + sent.get("reduce_scatter", 0))
    return gathered / (shares * 1e9) + 2 * sent.get("reduce", 0) / (sums * 1e9)


def _bytes_decoding(plan: Plan) -> float:
    """The weights, read once for each token of the completions that are sampled together."""
    return plan.work.decoded * plan.parameters[0] * (4 if plan.resolved.machine.precision == "32-true" else 2)


def largest_micro_batch(plan: Plan, card: Card) -> int | None:
    """About how many rows fit in a forward pass: what a row's activations take, as often as there is room. None: not even one."""
    held = plan.need.phases["training"]
    row = held.get("activations", 0) / plan.micro_batch_size / 1e9
    room = card.memory_gb / margin(plan) - (sum(held.values()) - held.get("activations", 0)) / 1e9
    share = plan.work.accumulation * plan.micro_batch_size  # rows of a step and process
    fitting = [rows for rows in range(1, share + 1) if share % rows == 0 and rows * row <= room]
    return max(fitting, default=None)
