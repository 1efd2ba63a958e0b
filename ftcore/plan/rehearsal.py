"""The phases of a run, each taken once by the run's own method on tensors without storage, and what they hold.

The device is the CPU whatever is planned for: sizes are the same, and a build of torch without CUDA has no other. Of several
processes this one is the first, which has the largest share; the others are pretended.
"""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from ftcore.kernels.lora_linear import LoraLinear
from ftcore.kernels.packed_weights import LARGEST, linear_layers
from ftcore.methods.base import Method
from ftcore.methods.online import OnlineMethod
from ftcore.methods.terms import by_row
from ftcore.models import sharding
from ftcore.models.blocks import transformer_blocks
from ftcore.models.logprobs import completion_logps, sequence_scores
from ftcore.models.precision import of_trainer
from ftcore.plan.fakes import allocate, faked, without_storage
from ftcore.plan.memory import Held, Kind
from ftcore.plan.work import Work
from ftcore.rollout.cache import roomy_cache
from ftcore.rollout.sample import draw_tokens, last_logits
from ftcore.settings import Config, Machine

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Need:
    """What one process needs.

    Args:
        phases: bytes held by kind at the peak of each phase.
        flops: of the followed micro-batch: of matmuls and of attention.
        sent: bytes of the followed micro-batch that are sent, by kind: gather, reduce_scatter, and reduce, once in a step.
        operations: that the host starts for the followed micro-batch.
        tokens: of the followed micro-batch, padding included.
        squares: the same with squared lengths.
    """

    phases: dict[str, dict[Kind, int]]
    flops: dict[str, int]
    sent: dict[str, int]
    operations: int
    tokens: int
    squares: int

    @property
    def phase(self) -> str:
        """The one with the highest peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Bytes at the highest peak."""
        return sum(self.phases[self.phase].values())


@contextmanager
def pretended(machine: Machine) -> Iterator[None]:
    """Inside, this process is the first of all processes of a machine."""
    if machine.processes == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=machine.processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def rehearse(config: Config, machine: Machine, method: Method, work: Work) -> Need:
    """Take every phase of a run once. `machine` is the planned one, `method` is on the meta device."""
    gc.disable()  # the peak must not depend on when it runs
    try:
        with without_storage() as mode:
            return _Rehearsal(config, machine, method, faked(work, mode)).need()
    finally:
        gc.enable()


class _Rehearsal:
    def __init__(self, config: Config, machine: Machine, method: Method, work: Work) -> None:
        self.config, self.machine, self.method, self.work = config, machine, method, work
        sharding.shard(method.networks(), CPU, machine.precision in ("bf16-mixed", "bf16-true"))
        for network in method.networks():
            allocate(network)
        method.trainer = self.trainer = _trainer(machine)
        self.optimizer: Any = method.configure_optimizers()["optimizer"]  # type: ignore[index,call-overload]
        self.held, self.phases = Held(), dict[str, dict[Kind, int]]()
        # A process of ddp copies gradients into buckets, from which they are sent.
        trained = sum(parameter.nbytes for parameter in method.trained_parameters())
        self.copies = self._copies()
        self.buckets = torch.empty(trained if machine.strategy == "ddp" else 0, dtype=torch.uint8)

    def need(self) -> Need:
        """All phases, in the order of a run."""
        self._begin()
        with self._phase("training"):
            self._micro_batch()
            self.method.configure_gradient_clipping(self.optimizer)
            self.optimizer.step()
        flops, sent, operations = dict(self.held.flops), dict(self.held.sent), self.held.operations
        sent["reduce"] = sent.get("reduce", 0) + self.buckets.nbytes
        if isinstance(self.method, OnlineMethod):
            with self._phase("rollouts"), self._between_steps():
                self._rollouts(self.method)
        elif self.method.apart_between_steps:
            with self._phase("between steps"), self._between_steps():
                self._computed(self.method.loss, self.work.micro_batch)
        if self.config["evaluate"]["enabled"]:
            with self._phase("comparison"), self._between_steps():
                self._comparison()
        ids = self.work.micro_batch["input_ids"]
        return Need(self.phases, flops, sent, operations, ids.numel(), ids.numel() * ids.shape[1])

    def _begin(self) -> None:
        """What a step finds of the one before: gradients and the optimizer's state."""
        with sharding.unsharded(self.method.networks()):
            pass  # FSDP2 makes buffers when it gathers for the first time
        for parameter in self.method.trained_parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.method.step_metrics = {"loss": torch.zeros(())}
        self.method.configure_gradient_clipping(self.optimizer)
        self.optimizer.step()
        held, method = self.held, self.method
        for network in method.networks():
            held.see([*network.parameters(), *network.buffers()], "weights")
        held.see([*(parameter.grad for parameter in method.parameters()), self.buckets], "gradients")
        held.see((value for state in self.optimizer.state.values() for value in state.values()), "optimizer")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Note the peak of what happens inside."""
        self.held.start("activations")
        with self.held, self.held.following_resizes():
            yield
        self.phases[name] = {kind: size for kind, size in self.held.peak.items() if size}

    def _micro_batch(self) -> None:
        """The last micro-batch of a step. Lightning frees earlier gradients before the backward pass of a step's first."""
        method = self.method
        with self.trainer.precision_plugin.train_step_context():
            loss = method.training_step(self.work.micro_batch, 0)
        if self.work.accumulation == 1:
            self.optimizer.zero_grad()
        self.held.kind = "temporary"
        loss.backward()
        self.held.see((parameter.grad for parameter in method.parameters()), "gradients")

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """What a run does apart from its steps, in the few blocks that stand for all."""
        networks = filter(transformer_blocks, self.method.networks())
        with torch.no_grad(), self.method.unsharded_and_eager(), ExitStack() as stack:
            for network in networks:
                stack.enter_context(_shallow(network))
            yield

    def _computed(self, function: Any, *arguments: Any) -> Any:
        with self.trainer.precision_plugin.forward_context():
            return function(*arguments)

    def _comparison(self) -> None:
        """Answers, loss and general text of held-out rows, a batch of each."""
        method, work = self.method, self.work
        method.network.eval()
        if work.answered[0]:
            self._computed(self._generate, *work.answered, 1, self.config["evaluate"]["max_new_tokens"])
        if work.scored:
            for term in self._computed(method.loss, work.scored).values():
                by_row(term, work.scored)
        if work.probe:
            self._computed(completion_logps, method.network, work.probe)
        method.network.train()

    def _rollouts(self, method: OnlineMethod) -> None:
        """Sampling, the reward model's scores, and what else each token gets."""
        batch, prompts = self.work.micro_batch, max(self.work.sampled // method.group_size, 1)
        method.network.eval()
        new = method.max_new_tokens
        self._computed(self._generate, prompts, self.work.longest - new, method.group_size, new)
        if method.scorer:
            rows = method.context.micro_batch_size
            ids = torch.ones(rows, self.work.longest, dtype=torch.long)
            ends = torch.zeros(2, rows, dtype=torch.long)
            scored: Any = {"input_ids": ids, "attention_mask": ids, "ends": ends}
            self._computed(sequence_scores, method.scorer.network, scored)
        self._computed(completion_logps, method.network, batch)
        if method.beta:
            with method.foundation.base_view() as base:
                self._computed(completion_logps, base, batch)
        method.network.train()

    def _generate(self, prompts: int, length: int, group_size: int, new: int) -> None:
        """The first token and the last of completions, as `rollout.sample` makes them."""
        network, rows = self.method.network, prompts * group_size
        copies = torch.empty(self.copies, dtype=torch.uint8)
        cache, draws = roomy_cache(network.config, new), torch.zeros(rows, new, dtype=torch.double)
        kinds, ids = _kinds(network, len(cache.layers)), torch.ones(prompts, length, dtype=torch.long)
        logits = last_logits(network, ids, ids, cache).repeat_interleave(group_size, 0)
        cache.batch_repeat_interleave(group_size)
        for tokens in (length + 1, length + new):
            others = None  # freed before those that are longer are made
            others = _of_other_blocks(cache, kinds)
            draw_tokens(logits, draws[:, 0], 1.0, 1.0)
            _fill(cache, tokens - 1)
            mask = torch.ones(rows, tokens, dtype=torch.long)
            logits = last_logits(network, mask[:, :1], mask, cache)
        draw_tokens(logits, draws[:, 0], 1.0, 1.0)
        del copies, others

    def _copies(self) -> int:
        """Bytes of the copies that `packed_weights` makes: on a CPU of all layers in float32, else of those with an update."""
        on_cpu = self.machine.accelerator == "cpu" and self.machine.precision == "32-true"
        layers = [layer for layer in linear_layers(self.method.network) if on_cpu or isinstance(layer, LoraLinear)]
        width = 4 if self.machine.precision == "32-true" else 2
        size = sum(layer.weight.numel() for layer in layers) * width
        return size if size <= LARGEST else 0


@contextmanager
def _shallow(network: nn.Module) -> Iterator[None]:
    """Without gradients a block frees all before the next begins, so one of each kind stands for all."""
    blocks = transformer_blocks(network)
    kinds = _kinds(network, len(blocks))
    some = nn.ModuleList(blocks[: max(kinds.index(kind) for kind in set(kinds)) + 1])
    parent, name = next(
        (module, name)
        for module in network.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and list(child) == blocks
    )
    whole = getattr(parent, name)
    setattr(parent, name, some)
    try:
        yield
    finally:
        setattr(parent, name, whole)


def _kinds(network: Any, blocks: int) -> list[str]:
    """The kind of attention of each block."""
    return getattr(network.config.get_text_config(), "layer_types", None) or ["full_attention"] * blocks


def _of_other_blocks(cache: Any, kinds: list[str]) -> Tensor:
    """Keys and values of the blocks that `_shallow` left out."""
    sizes = {
        kind: 2 * layer.keys.untyped_storage().nbytes()
        for kind, layer in zip(kinds, cache.layers, strict=True)
        if layer.is_initialized
    }
    computed = sum(layer.is_initialized for layer in cache.layers)
    return torch.empty(sum(sizes[kind] for kind in kinds[computed:]), dtype=torch.uint8)


def _fill(cache: Any, length: int) -> None:
    """Let the cache hold `length` tokens, as if those between had been sampled."""
    for layer in cache.layers:
        if getattr(layer, "places", None):
            layer.keys, layer.values = (places[:, :, :length] for places in layer.places)


def _trainer(machine: Machine) -> lightning.Trainer:
    """A trainer of one process, of which a method reads the precision and the number of steps."""
    precision = of_trainer("bf16-mixed" if machine.precision == "16-mixed" else machine.precision)
    return lightning.Trainer(
        accelerator="cpu", devices=1, precision=precision, max_steps=1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
