"""What every fine-tuning method shares: exact averages, optimizer, schedule, clipping, and the retention term.

A method is a class with a record type, an encoding and a loss. Its loss returns sums. The base class divides them by counts
over the whole optimizer step, so micro-batches, accumulation and processes never change the average: (x1/n1)+(x2/n2) is not
(x1+x2)/(n1+n2).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, dataclass_transform

import lightning
import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ftcore.console import stderr
from ftcore.data.examples import Example
from ftcore.data.layouts import Batch, T, pad, share_prompts
from ftcore.data.sources import Row
from ftcore.data.steps import Draw, E, longest_first
from ftcore.data.tokens import Encoder
from ftcore.errors import NumericalError
from ftcore.kernels.projection import projects_alone
from ftcore.machine.processes import gathered
from ftcore.methods.losses import token_kl
from ftcore.methods.reward_model import RewardModel, load_reward_model
from ftcore.methods.terms import Averages, ByRow, Term, by_row, losses_by_row
from ftcore.models.foundation import Foundation, takes_any_mask
from ftcore.models.logprobs import logits_at, sequence_sums
from ftcore.models.precision import computing_in
from ftcore.models.reference import ReferenceSums, content_hash
from ftcore.models.sharding import full_tensor, shard, sum_over_copies, unsharded
from ftcore.settings import Precision

B = TypeVar("B", bound=Batch)
# Ranges of config parameters.
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Clip = Annotated[float, Gt(0), Le(1e30)]  # of float32 numbers, which hold no larger one
Fraction = Annotated[float, Ge(0), Le(1)]
PositiveFraction = Annotated[float, Gt(0), Le(1)]


@dataclass
class HeldOut:
    """What models are scored on: held-out rows and their encodings, cloze sentences, and general text (the probe)."""

    rows: list[Row]
    examples: list[Any]
    cloze: list[Row]
    probe: list[Example]


@dataclass(frozen=True)
class RunContext:
    """Settings of the run that a method needs beside its own config.

    Args:
        micro_batch_size: rows per forward pass outside training.
        max_bad_steps: how many steps in a row may be skipped because they are not finite.
        retention_weight: weight of the KL term on general text.
        references: cache of the base model's log-probabilities.
        row_losses: whether to keep the loss of each row.
        precision: in which other networks than the trained one compute.
        reward_model: what makes one of a path, the policy's encoder and the precision.
    """

    micro_batch_size: int = 1
    max_bad_steps: int = 0
    retention_weight: float = 0.0
    references: ReferenceSums = field(default_factory=ReferenceSums)
    row_losses: bool = False
    precision: Precision = "32-true"
    reward_model: Callable[[str, Encoder, Precision], RewardModel] = load_reward_model


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
class Configured(lightning.LightningModule):
    """A module whose subclasses are dataclasses: their annotated attributes are their config parameters."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(kw_only=True, eq=False, repr=False)(cls)


class Method(Configured, Generic[E, B]):
    """Base class of all methods. `E` is what a method trains on (examples, pairs, completions), `B` a batch of them.

    Args:
        foundation: network and tokenizer, adapter applied.
        encoder: turns rows into token ids.
        context: settings of the run (default: those of a run without options).
    """

    foundation: Foundation = field(kw_only=False)
    encoder: Encoder = field(kw_only=False)
    context: RunContext = field(kw_only=False, default_factory=RunContext)
    lr: Positive
    weight_decay: NonNegative
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]]
    schedule: Literal["constant", "linear", "cosine"]
    warmup: Fraction
    final_lr: Fraction
    max_grad_norm: Positive

    record_type: ClassVar[str]
    # Whether the loss compares with the base model, whose weights are then kept.
    has_reference: ClassVar[bool] = False
    # Whether the network sees the same sequences in every epoch.
    rows_recur = True
    # Whether `prepare` or validation compute, each process as many forward passes as it has rows: then each needs all weights.
    apart_between_steps: ClassVar[bool] = False
    # For methods that sample: completions per prompt, and optimizer steps on each set of them.
    group_size = updates = 1

    def __post_init__(self) -> None:
        super().__init__()
        self.network = self.foundation.network
        self.retention_weight = self.context.retention_weight if self.predicts_tokens else 0.0
        self.metrics, self.validation = dict[str, float](), Averages()
        self.lr_scale, self.bad_steps = 1.0, 0
        # Of the step under way, on the device: sums of loss and terms, and each micro-batch with its loss and terms.
        self.step_metrics = dict[str, Tensor]()
        self.micro_batches: list[tuple[Tensor, dict[str, Term], B]] = []
        # Of the last step: the sums over all processes, with grad_norm and tokens; each row's loss, if the context asks for it.
        self.step_totals, self.row_losses = dict[str, float](), list[float]()
        if self.has_reference or self.retention_weight:
            self.foundation.keep_base()
        if self.has_reference:
            self.foundation.disable_dropout()

    # A method must define:

    def encode(self, rows: list[Row]) -> list[Any]:
        """Turn rows into examples, pairs, or the prompts that `prepare` samples completions for."""
        raise NotImplementedError

    def counts(self, example: E) -> dict[str, int]:
        """What an example adds to the counts that terms are divided by. It depends on the example's mask alone."""
        raise NotImplementedError

    def loss(self, batch: B) -> dict[str, Term]:
        """Terms of the loss of one micro-batch, as sums."""
        raise NotImplementedError

    # A method may override:

    @classmethod
    def architecture_of(cls, node: Mapping[str, object]) -> str:
        """The transformers auto class that this method needs with the config `node`, without `AutoModelFor`."""
        return "CausalLM"

    @classmethod
    def control_tokens(cls, node: Mapping[str, object], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Control tokens that the method needs; those that the tokenizer lacks are added."""
        return ()

    def collate(self, examples: list[E]) -> B:
        """Turn examples into a batch, padded on the right."""
        return self.collate_text(examples)  # type: ignore[arg-type,return-value]  # for `E` = Example; others override it

    def arrange(self, rows: list[E]) -> list[E]:
        """Order the rows of a step. Micro-batches and processes take theirs from the front."""
        return longest_first(rows)

    def prepare(self, draw: Draw, random: np.random.Generator) -> list[E]:
        """What to train on in a step: by default the rows of one draw. `random` is the same in every process."""
        return draw()

    def deal(self, rows: list[E], processes: list[int]) -> list[E]:
        """The arranged rows of a step with what this process needs of them; `processes` says which trains on each."""
        return rows

    def encode_text(self, rows: list[Row], length: int | None = None) -> list[Example]:
        """Turn plain text into examples, for the probe and the retention term."""
        return self.encoder.texts(rows, length)

    def held_out_scores(self, held_out: HeldOut, batch_size: int) -> dict[str, ByRow | float | None]:
        """Scores of held-out rows in addition to the terms of the loss: each a number, or by row if it is the rows' mean."""
        return {}

    def validation_terms(self, batch: B) -> dict[str, Term]:
        """Terms to average over validation rows."""
        return self.loss(batch)

    def held_out_rows(self, examples: list[E]) -> list[E]:
        """All held-out rows with what their loss needs of each other, before they are cut into batches."""
        return examples

    def held_out_terms(self, examples: list[E]) -> dict[str, Term]:
        """Terms to average over held-out rows, by row where they can be told apart."""
        batch = self.to_device(self.collate(examples))
        return {name: by_row(term, batch) for name, term in self.loss(batch).items()}

    # The base class does the rest.

    def rows_of_step(self, draw: Draw, random: np.random.Generator) -> list[E]:
        """`prepare` in the precision that the step will have."""
        with self._between_steps(), self.trainer.precision_plugin.forward_context():
            return self.prepare(draw, random)

    def _between_steps(self) -> AbstractContextManager[object]:
        """For drawing rows and validating."""
        return self.unsharded_and_eager() if self.apart_between_steps else torch.compiler.set_stance("force_eager")

    def configure_model(self) -> None:
        """Shard the weights if the strategy asks for it."""
        shard(self.networks(), self.trainer.strategy.root_device, self.trainer.precision == "bf16-mixed")
        # This takes a forward pass: now, with all processes. Networks that are whole are not on their device yet.
        with computing_in(self.context.precision, self.network.device.type):
            for network in filter(predicts_tokens, self.networks()):
                projects_alone(network)

    def networks(self) -> list[Any]:
        """All networks that the method computes with."""
        return [*self.children(), *filter(None, [self.foundation.frozen_copy])]

    @contextmanager
    def unsharded_and_eager(self) -> Iterator[None]:
        """All weights in every process and nothing compiled: where each has its own number of forward passes."""
        with unsharded(self.networks()), torch.compiler.set_stance("force_eager"):
            yield

    def on_train_batch_start(self, batch: B, batch_idx: int) -> None:
        """Sum gradients over copies of a sharded model only in the last micro-batch of a step."""
        for network in self.children():
            sum_over_copies(network, (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0)

    @property
    def predicts_tokens(self) -> bool:
        """Whether the network predicts tokens (a reward model does not)."""
        return predicts_tokens(self.network)

    @property
    def pad_id(self) -> int:
        """The padding token. It may also be a token of the text: only masks tell what is padding."""
        return self.foundation.tokenizer.pad_token_id or 0

    def collate_text(self, examples: Sequence[Example], shared_prompts: bool = False) -> Batch:
        """Turn sequences into a batch, padded on the right.

        `shared_prompts`: compute a prompt that several of them begin with only once, if the architecture allows it.
        """
        # Cached outputs of frozen blocks need a row per answer: only such rows come again.
        if shared_prompts and examples and takes_any_mask(self.network) and not self.foundation.caches_activations:
            width = self.network.config.get_text_config().hidden_size
            batch: Batch = share_prompts(examples, self.pad_id, width)
        else:
            batch = pad(examples, self.pad_id)
        if self.has_reference:
            batch["contents"] = [content_hash(example) for example in examples]
        return batch

    @torch.no_grad()
    def reference_sums(self, batch: Batch) -> Tensor:
        """Summed log-probability (S,) of each sequence's tokens with loss under the base model."""

        def compute() -> Tensor:
            with self.foundation.base_view() as base:
                return sequence_sums(base, batch)

        # Sharded weights: every process takes part in every forward pass, whatever it has in its cache.
        contents = [] if self.device_mesh else batch["contents"]
        return self.context.references(contents, compute).to(self.network.device, non_blocking=True)

    def to_device(self, batch: T) -> T:
        """The batch on the network's device, also outside a Trainer."""
        return self.transfer_batch_to_device(batch, self.network.device, 0)  # type: ignore[no-any-return]

    def training_step(self, batch: B, batch_idx: int) -> Tensor:
        """Weighted sum of the terms, each divided by its count in the whole step.

        Lightning divides by the number of micro-batches, and data-parallel strategies by the number of processes. Both are
        multiplied back here, so that gradients add up to exactly sum / count.
        """
        terms = self.loss(batch)
        if "retention" in batch:
            terms["retention"] = self.retention(batch["retention"])
        parts = {name: term.total / max(batch["counts"].get(term.per, 0), 1) for name, term in terms.items()}
        loss = torch.stack([term.weight * parts[name] for name, term in terms.items() if term.weight]).sum()
        self._note(batch, terms, {"loss": loss, **parts, "tokens": torch.full_like(loss, batch["tokens"])})
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def _note(self, batch: B, terms: dict[str, Term], sums: dict[str, Tensor]) -> None:
        """Keep a micro-batch's numbers on the device to the end of its step: reading one here would stop the host."""
        for name, value in sums.items():
            self.step_metrics[name] = self.step_metrics.get(name, torch.zeros_like(sums["loss"])) + value.detach()
        detached = {name: term._replace(values=term.values.detach()) for name, term in terms.items()}
        self.micro_batches.append((sums["loss"].detach(), detached, batch))

    def retention(self, batch: Batch) -> Term:
        """KL divergence from the base model on general text: the term that limits forgetting."""
        rows, columns = batch["trained"]
        with torch.no_grad(), self.foundation.base_view() as base:
            reference = logits_at(base, batch, (rows, columns))  # (N, V)
        logits = logits_at(self.network, batch, (rows, columns))
        return Term(token_kl(logits, reference), len(reference), "retention", self.retention_weight)

    def progress(self) -> dict[str, float]:
        """What a checkpoint keeps of a method beside its weights."""
        return {"lr_scale": self.lr_scale, "bad_steps": self.bad_steps}

    def restore(self, progress: Mapping[str, float]) -> None:
        """Continue from what `progress` returned."""
        self.lr_scale, self.bad_steps = progress["lr_scale"], int(progress["bad_steps"])

    def halve_lr(self) -> None:
        """Halve the learning rate of all later steps."""
        self.lr_scale /= 2

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """Replace the tuned network with the base model's, inside a `with` block."""
        with self.foundation.base_view() as base:
            tuned, self.network = self.network, base
            try:
                yield
            finally:
                self.network = tuned

    def validation_step(self, batch: B, batch_idx: int) -> None:
        """Sum each term over the validation rows."""
        with self._between_steps():
            self.validation.add(self.validation_terms(batch))

    def on_validation_epoch_end(self) -> None:
        """Average over all processes, log, and start again from zero."""
        averages = {f"val/{name}": value for name, value in self.validation.over_processes().items()}
        self.validation = Averages()
        self.log_dict(averages, prog_bar=True, logger=False)
        for logger in self.trainer.loggers:
            logger.log_metrics(averages, step=self.trainer.global_step)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: object, **__: object) -> None:
        """Clip by the global norm. A step whose norm or loss is not finite is skipped. The host waits for the device once."""
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.trained_parameters(), self.max_grad_norm))
        names, values = sorted(self.step_metrics), [self.step_metrics[name] for name in sorted(self.step_metrics)]
        sums = self.trainer.strategy.reduce(torch.stack(values).float(), reduce_op="sum")
        numbers = torch.cat([sums, norm.detach().float()[None]]).tolist()
        self.step_totals = dict(zip([*names, "grad_norm"], numbers, strict=True))
        if self.context.row_losses:
            self.row_losses = torch.cat(
                [losses_by_row(terms, batch) for _, terms, batch in self.micro_batches]
            ).tolist()
        if math.isfinite(self.step_totals["grad_norm"]) and math.isfinite(self.step_totals["loss"]):
            self.bad_steps = 0
        elif getattr(self.trainer.precision_plugin, "scaler", None) is None:  # float16's scaler skips such steps itself
            self._skip_step()
        self.step_metrics, self.micro_batches = {}, []

    def _bad_rows(self) -> list[str]:
        """Ids of the step's rows whose loss is not finite; all of a micro-batch where no single row's is to blame."""
        bad = list[str]()
        for loss, terms, batch in self.micro_batches:
            if not loss.isfinite():
                losses = zip(batch["ids"], losses_by_row(terms, batch).tolist(), strict=True)
                bad += [id for id, row_loss in losses if not math.isfinite(row_loss)] or batch["ids"]
        return bad

    def _skip_step(self) -> None:
        """Take no step. Raises `NumericalError` after more than `max_bad_steps` in a row; the same in every process."""
        for parameter in self.trained_parameters():
            parameter.grad = None  # AdamW ignores parameters without a gradient
        self.bad_steps += 1
        rows = [id for part in gathered(self._bad_rows()) for id in part]
        where = f"rows {', '.join(rows[:8])}{' ...' if len(rows) > 8 else ''}" if rows else "its gradient"
        message = f"Step {self.trainer.global_step + 1} is not finite ({where}). It was skipped."
        if self.bad_steps > self.context.max_bad_steps:
            raise NumericalError(
                f"{message} It is number {self.bad_steps} in a row (max_bad_steps={self.context.max_bad_steps}). Lower "
                "method.lr, or look at these rows."
            )
        if self.trainer.is_global_zero:
            stderr.print(message)

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that the optimizer changes."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with weight decay on matrices only. The schedule is a function of the step."""
        matrices = [p for p in self.trained_parameters() if p.ndim >= 2]
        vectors = [p for p in self.trained_parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        # Fused is one pass over memory. With float16's scaler it would forbid clipping.
        fused = getattr(self.trainer.precision_plugin, "scaler", None) is None
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=self.lr, betas=(self.betas[0], self.betas[1]), fused=fused
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_factor(self, step: int) -> float:
        """Fraction of the peak learning rate at a step: linear warm-up, then the schedule down to `final_lr`."""
        total = self.trainer.max_steps
        warmup = round(self.warmup * total)
        if step < warmup:
            return self.lr_scale * (step + 1) / warmup
        done = (step - warmup) / max(total - warmup, 1)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]
        return self.lr_scale * (self.final_lr + (1 - self.final_lr) * shape)


def predicts_tokens(network: Any) -> bool:
    """Whether a module is a network with logits (a reward model and a value head are none)."""
    return hasattr(network, "get_output_embeddings") and network.get_output_embeddings() is not None


def own_settings(node: Mapping[str, object]) -> dict[str, object]:
    """The keys of a method's config node that not all methods have: what it does to rows depends on no others."""
    shared = {parameter.name for parameter in fields(Method)}
    return {key: value for key, value in node.items() if key not in shared}
