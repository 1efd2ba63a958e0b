"""Plans of one config and of others that differ from it a little: they share rows and tokenizer."""

import copy
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, replace
from typing import cast

import torch

from ftcore.config.build import build, record_type
from ftcore.config.tree import put
from ftcore.data import Data, Records
from ftcore.data.tokens import Encoder
from ftcore.methods.base import Method
from ftcore.methods.reward_model import RewardModel
from ftcore.models import sharding
from ftcore.models.blocks import transformer_blocks
from ftcore.models.foundation import Foundation
from ftcore.models.reference import ReferenceSums
from ftcore.plan.four_bit import in_four_bits
from ftcore.plan.measured import seconds_of_run
from ftcore.plan.network import without_weights
from ftcore.plan.rehearsal import Need, pretended, rehearse
from ftcore.plan.work import Work, work_of_data, work_of_length
from ftcore.run_folder import Run
from ftcore.runs.resolve import resolve
from ftcore.runs.stages import stage_config, stages_of
from ftcore.settings import Config, Model, Precision, Resolved
from ftcore.train.prepare import load_method

# The path of what a stage has yet to make.
UNMADE = "unmade"
# Rows of a plan without data, if their number is not given.
ROWS = 1000


@dataclass(frozen=True)
class Plan:
    """What a run of a config needs.

    Args:
        parameters: of the network, and how many of them train.
        root_bytes: weights around the blocks, which every process loads whole.
    """

    config: Config
    resolved: Resolved
    need: Need
    work: Work
    micro_batch_size: int
    parameters: tuple[int, int]
    root_bytes: int

    @property
    def host(self) -> int:
        """Bytes of weights that the processes of one machine hold in its memory while they load."""
        machine, weights = self.resolved.machine, self.need.phases["training"]["weights"]
        return machine.devices * (weights + (self.root_bytes if machine.strategy == "fsdp" else 0))

    @property
    def flops(self) -> float:
        """Of all steps on all processes: matmuls grow with the tokens, attention with their squares."""
        need, work = self.need, self.work
        matmuls, attention = need.flops.get("matmuls", 0), need.flops.get("attention", 0)
        return matmuls * work.tokens / need.tokens + attention * work.squares / need.squares

    @property
    def checkpointing(self) -> bool:
        """Whether it is planned with activation checkpointing."""
        return self.config["hardware"]["activation_checkpointing"] is True

    @property
    def gb(self) -> float:
        """Of one device, 10^9 bytes."""
        return self.need.peak / 1e9


def largest(plans: Mapping[str, Plan]) -> Plan:
    """The plan with the highest peak: a run's, or that of one of its stages."""
    return max(plans.values(), key=lambda plan: plan.need.peak)


class Planner:
    """Plans a config and variants of it. Rows are read once, and no weights at all."""

    def __init__(self, config: Config, stack: ExitStack) -> None:
        self.config, self.stack, self.notes = config, stack, dict[str, None]()
        self.models, self.rows = dict[str, Model](), dict[str, Records]()

    def plan(self, changes: Mapping[str, object] | None = None) -> dict[str, Plan]:
        """Of the config with other values under some dotted keys: the plans of its stages that have no run, and its own, by name.

        Raises what a run of it would raise before it loads a model.
        """
        config = copy.deepcopy(self.config)
        for key, value in (changes or {}).items():
            put(config, key, value)
        listed, method = stages_of(config["method"]), config["method"]
        unmade = {name: stage_config(config, name, words) for name, words in listed.items() if method[name] is None}
        stages = {f"stage {name}": self._plan(stage, {}) for name, stage in unmade.items()}
        return {**stages, "run": self._plan(config, unmade)}

    def measured(self, plan: Plan) -> float | None:
        """Seconds of all steps of a run on this CPU; None where three steps would take minutes, or rows are made up."""
        node = self._model(plan.config, plan.config["model"])
        return (
            None
            if self.config["plan"]["tokens"]
            else seconds_of_run({**plan.config, "model": node}, plan.work, plan.flops)
        )

    def _plan(self, config: Config, stages: dict[str, Config]) -> Plan:
        resolved = resolve(config, {}, elsewhere=True)
        here = replace(resolved, machine=replace(resolved.machine, accelerator="cpu"))
        with pretended(here.machine), redirect_stdout(None):
            method = self._method(config, here, stages)
            work = self._work(config, resolved, method)
            counted = method.network.num_parameters(), method.network.num_parameters(only_trainable=True)
            root = _bytes_around_blocks(method.network)
            if config["adapter"].get("load_in_4bit"):
                in_four_bits(method.network)
            need = rehearse(config, resolved.machine, method, work)
        return Plan(config, resolved, need, work, work.micro_batch_size, counted, root)

    def _method(self, config: Config, resolved: Resolved, stages: dict[str, Config]) -> Method:
        """The method on the meta device."""

        def reward_model(path: str, encoder: Encoder, precision: Precision) -> RewardModel:
            run = Run.at(path)
            made = stages.get("reward_model") or cast(Config, run.config if run else {**config, "adapter": None})
            node = (
                made["model"] if path == UNMADE else {**config["model"], "path": path, "package": None, "shape": None}
            )
            foundation = build(self._model(config, node), Foundation, "SequenceClassification")
            if made["adapter"]:
                foundation = build(made["adapter"], Foundation, foundation)
            return RewardModel(foundation, encoder.data, precision)

        node, changed = config["adapter"], {"load_in_4bit": False, "keep_activations_gb": 0.0}
        checkpointing = config["hardware"]["activation_checkpointing"] is True
        planned = {
            **config,
            "model": self._model(config, config["model"]),
            "method": {**config["method"], **{name: UNMADE for name in stages}},
            "hardware": {**config["hardware"], "activation_checkpointing": checkpointing, "compile": False},
            "adapter": {**node, **{key: value for key, value in changed.items() if key in node}},
        }
        if node.get("load_in_4bit") and resolved.machine.strategy == "fsdp":
            planned["adapter"] = node  # which is refused
        with torch.device("meta"), sharding.in_shares(resolved.machine):
            method = load_method(
                cast(Config, planned), resolved, build(config["data"], Data),
                references=ReferenceSums(), reward_model=reward_model,
            )  # fmt: skip
        return method

    def _model(self, config: Config, node: Model) -> Model:
        key = str((node["path"], node["package"]))
        if key not in self.models:
            self.models[key], notes = self.stack.enter_context(without_weights({**config, "model": node}))
            self.notes |= dict.fromkeys(notes)
        return {**node, **{name: self.models[key][name] for name in ("path", "package", "random_weights")}}  # type: ignore[typeddict-item,return-value]

    def _work(self, config: Config, resolved: Resolved, method: Method) -> Work:
        asked = self.config["plan"]
        if tokens := asked["tokens"]:
            return work_of_length(config, resolved, method, tokens, asked["rows"] or ROWS)
        kind = record_type(config["method"])
        if kind not in self.rows:
            self.rows[kind] = build(config["data"], Data).load(kind)
        return work_of_data(config, resolved, method, self.rows[kind])


def _bytes_around_blocks(network: torch.nn.Module) -> int:
    """Bytes of the weights that belong to no transformer block."""
    inside = {id(value) for block in transformer_blocks(network) for value in block.parameters()}
    return sum(value.nbytes for value in network.parameters() if id(value) not in inside)
