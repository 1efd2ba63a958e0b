"""What every fine-tuning method shares: exact averages, optimizer, schedule, clipping, and memory of the base model.

A method is a class with a record type, an encoding and a loss. Its loss returns sums; the base divides them by counts over
the whole optimizer step, so micro-batches, accumulation and processes never change the average ((x1/n1)+(x2/n2) is not
(x1+x2)/(n1+n2)).
"""

import inspect
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import lightning
import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ftcore.data.layouts import Batch, T, pad, share_prompts
from ftcore.data.sources import Row
from ftcore.data.steps import Draw, E, longest_first
from ftcore.data.tokens import Encoder, Example
from ftcore.errors import NumericalError
from ftcore.machine.processes import gathered
from ftcore.methods.losses import token_kl
from ftcore.models.foundation import Foundation, takes_any_mask
from ftcore.models.logprobs import logits_at, row_sums, sequence_sums
from ftcore.models.reference import ReferenceSums, content_hash
from ftcore.models.sharding import full_tensor, shard, sync_gradients, unsharded

B = TypeVar("B", bound=Batch)


class Term(NamedTuple):
    """One term of a loss: values, how many things they add up to, what those are (a key of `counts`), its weight in the total.

    `values` has one for each token with loss or for each row, or is their sum. A term of weight 0 is a metric: averaged and
    logged like the others.
    """

    values: Tensor  # (N,), (S,), (P,) or ()
    size: int
    per: str
    weight: float = 1.0

    @property
    def total(self) -> Tensor:
        """The sum of the values."""
        return self.values.sum()


@dataclass
class HeldOut:
    """What models are scored on: held-out rows with their encodings, sentences with a gap, and the general-text probe."""

    rows: list[Row]
    examples: list[Any]
    cloze: list[Row]
    probe: list[Example]


@dataclass(frozen=True)
class RunContext:
    """What a run gives its method beside the method's own node.

    Args:
        micro_batch_size: rows of a forward pass outside training.
        max_bad_steps: steps in a row that may be left out because they are not finite.
        retention_weight: weight of the KL term on general text.
        references: where the base model's log-probabilities are kept.
        row_losses: whether the loss of each row is asked for.
    """

    micro_batch_size: int = 1
    max_bad_steps: int = 0
    retention_weight: float = 0.0
    references: ReferenceSums = field(default_factory=ReferenceSums)
    row_losses: bool = False


class Method(lightning.LightningModule, Generic[E, B]):
    """Base class of all methods. `E` is what one trains on (an example, a pair, a completion), `B` a batch of them.

    Args:
        foundation: network and tokenizer, adapter applied.
        encoder: turns rows into token ids.
        context: what the run settles for its method.
    """

    record_type: ClassVar[str]
    # Whether the loss compares with the base model, so that its weights must stay at hand.
    has_reference: ClassVar[bool] = False
    # Whether the network sees the same sequences in every epoch.
    rows_recur = True
    # Completions of each row and optimizer steps on them, for methods that sample.
    group_size = 1
    updates = 1

    def __init__(
        self,
        foundation: Foundation,
        encoder: Encoder,
        context: RunContext | None = None,
        /,
        *,
        lr: Annotated[float, Gt(0)],
        weight_decay: Annotated[float, Ge(0)],
        betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]],
        schedule: Literal["constant", "linear", "cosine"],
        warmup: Annotated[float, Ge(0), Le(1)],
        final_lr: Annotated[float, Ge(0), Le(1)],
        max_grad_norm: Annotated[float, Gt(0)],
    ) -> None:
        super().__init__()
        self.foundation, self.network, self.encoder = foundation, foundation.network, encoder
        self.lr, self.weight_decay, self.betas = lr, weight_decay, betas
        self.schedule, self.warmup, self.final_lr, self.max_grad_norm = schedule, warmup, final_lr, max_grad_norm
        self.context = context or RunContext()
        self.micro_batch_size, weight = self.context.micro_batch_size, self.context.retention_weight
        self.retention_weight = weight if weight and self.models_language else 0.0
        self.step_metrics: dict[str, Tensor] = {}
        self.metrics: dict[str, float] = {}
        self.lr_scale, self.bad_steps, self.bad_rows = 1.0, 0, list[str]()
        self.row_losses: list[float] = []  # of the last batch, where the context asks for them
        self.grad_norm = torch.tensor(0.0)
        if self.has_reference or self.retention_weight:
            foundation.keep_base()
        if self.has_reference:
            foundation.disable_dropout()

    # What a method defines.

    def encode(self, rows: list[Row]) -> list[Any]:
        """Rows to examples: token sequences with their loss masks, pairs of them, or prompts that `prepare` answers."""
        raise NotImplementedError

    def counts(self, example: E) -> dict[str, int]:
        """What an example adds to the counts that terms are divided by, known from its mask alone."""
        raise NotImplementedError

    def loss(self, batch: B) -> dict[str, Term]:
        """Terms of the loss of one micro-batch, as sums."""
        raise NotImplementedError

    # What a method may define.

    @classmethod
    def architecture_of(cls, node: Mapping[str, object]) -> str:
        """The transformers auto class that the config node of this method needs, without `AutoModelFor`."""
        return "CausalLM"

    @classmethod
    def control_tokens(cls, node: Mapping[str, object], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Control tokens that the tokenizer must have; those it lacks are added."""
        return ()

    def collate(self, examples: list[E]) -> B:
        """Examples side by side, padded on the right."""
        return self.collate_text(examples)  # type: ignore[arg-type,return-value]  # what is no `Example` needs its own

    def arrange(self, rows: list[E]) -> list[E]:
        """The rows of a step in the order in which micro-batches and processes take their share."""
        return longest_first(rows)

    def prepare(self, draw: Draw, random: np.random.Generator) -> list[E]:
        """What to train on in a step: by default the rows that it draws. `random` is the same in every process."""
        return draw()

    def pieces(self, rows: list[Row], length: int | None = None) -> list[Example]:
        """General text with loss, for the probe and the retention term."""
        return self.encoder.texts(rows, length)

    def held_out_scores(self, held_out: HeldOut, answers: list[Row], batch_size: int) -> dict[str, float]:
        """Scores of held-out rows beside the terms of the loss."""
        return {}

    def validation_terms(self, batch: B) -> dict[str, Term]:
        """Terms to average over validation rows."""
        return self.loss(batch)

    def held_out_terms(self, examples: list[E]) -> dict[str, Term]:
        """Terms to average over held-out rows."""
        return self.loss(self.placed(self.collate(examples)))

    # What the base class does with it.

    def rows_of_step(self, draw: Draw, random: np.random.Generator) -> list[E]:
        """`prepare` in the precision that the step will have."""
        with self.at_own_pace(), self.trainer.precision_plugin.forward_context():
            return self.prepare(draw, random)

    def configure_model(self) -> None:
        """Cut the weights into shares, where the strategy asks for it."""
        if self.device_mesh:
            mesh, device = self.device_mesh["data_parallel"], self.trainer.strategy.root_device
            for network in self._networks():
                shard(network, mesh, device, self.trainer.precision_plugin.precision)

    def _networks(self) -> list[torch.nn.Module]:
        copies = [self.foundation.frozen_copy] if self.foundation.frozen_copy else []
        return [*self.children(), *copies]

    @contextmanager
    def at_own_pace(self) -> Iterator[None]:
        """All weights in every process, and no kernels made for shapes that come once: for all that is not training."""
        with unsharded(self._networks()), torch.compiler.set_stance("force_eager"):
            yield

    def on_train_batch_start(self, batch: B, batch_idx: int) -> None:
        """Gradients of several processes are added up once a step."""
        for network in self.children():
            sync_gradients(network, (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0)

    @property
    def models_language(self) -> bool:
        """Whether the network predicts tokens."""
        return self.network.get_output_embeddings() is not None

    @property
    def pad_id(self) -> int:
        """The padding token; masks tell it from the same token elsewhere."""
        return self.foundation.tokenizer.pad_token_id or 0

    def collate_text(self, examples: Sequence[Example]) -> Batch:
        """Single sequences, padded on the right."""
        return self._with_contents(pad(examples, self.pad_id), examples)

    def collate_answers(self, examples: Sequence[Example]) -> Batch:
        """Sequences of which some begin with the same prompt: that is computed once, where the architecture allows it."""
        if not examples or not self.shares_prompts:
            return self.collate_text(examples)
        width = self.network.config.get_text_config().hidden_size
        return self._with_contents(share_prompts(examples, self.pad_id, width), examples)

    def _with_contents(self, batch: Batch, examples: Sequence[Example]) -> Batch:
        if self.has_reference:
            batch["contents"] = [content_hash(example) for example in examples]
        return batch

    @torch.no_grad()
    def reference_sums(self, batch: Batch) -> Tensor:
        """Summed log-probability (S,) of each sequence's tokens with loss under the base model."""

        def compute() -> Tensor:
            with self.foundation.base_view() as base:
                return sequence_sums(base, batch)

        if self.device_mesh:  # processes that share weights take part in every forward pass
            return compute()
        return self.context.references(batch["contents"], compute).to(self.network_device)

    @cached_property
    def shares_prompts(self) -> bool:
        """Whether the network takes a mask of who sees whom."""
        # Where outputs of frozen blocks are kept, a row for each answer is what comes again.
        return takes_any_mask(self.network) and not self.foundation.caches_activations

    def placed(self, batch: T) -> T:
        """The batch where the network is."""
        return move_data_to_device(batch, self.network_device)  # type: ignore[no-any-return]

    @property
    def network_device(self) -> torch.device:
        """Where the network is, also outside a Trainer."""
        return next(self.network.parameters()).device

    def training_step(self, batch: B, batch_idx: int) -> Tensor:
        """Weighted sum of each term's sum over its count in the whole step.

        Lightning divides by the number of micro-batches and data-parallel strategies by the number of processes; both are
        multiplied back, so that gradients add up to exactly sum / count.
        """
        terms = self.loss(batch)
        if self.context.row_losses:
            self.row_losses = losses_by_row(terms, batch)
        if "retention" in batch:
            terms["retention"] = self.retention(batch["retention"])
        shares = {name: term.total / max(batch["counts"].get(term.per, 0), 1) for name, term in terms.items()}
        loss = torch.stack([term.weight * shares[name] for name, term in terms.items() if term.weight]).sum()
        self._record(shares, loss)
        if not torch.isfinite(loss):
            losses = losses_by_row(terms, batch)
            self.bad_rows += [id for id, x in zip(batch["ids"], losses, strict=True) if not math.isfinite(x)] or batch[
                "ids"
            ]
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def retention(self, batch: Batch) -> Term:
        """KL from the base model's next-token distribution on general text: what keeps it from forgetting."""
        positions = batch["completion_mask"]
        with torch.no_grad(), self.foundation.base_view() as base:
            reference = logits_at(base, batch, positions)  # (N, V)
        divergence = token_kl(logits_at(self.network, batch, positions), reference)
        return Term(divergence, len(reference), "retention", self.retention_weight)

    def _record(self, shares: dict[str, Tensor], loss: Tensor) -> None:
        for name, value in {"loss": loss, **shares}.items():
            self.step_metrics[name] = self.step_metrics.get(name, torch.zeros((), device=loss.device)) + value.detach()

    def take_step_metrics(self) -> dict[str, Tensor]:
        """Loss and terms of the step that is complete, as this process's sums; the next step begins anew."""
        taken, self.step_metrics = self.step_metrics, {}
        return taken

    def progress(self) -> dict[str, float]:
        """What a checkpoint keeps of a method beside its weights."""
        return {"lr_scale": self.lr_scale, "bad_steps": self.bad_steps}

    def go_on(self, progress: Mapping[str, float]) -> None:
        """Go on from what `progress` gave."""
        self.lr_scale, self.bad_steps = progress["lr_scale"], int(progress["bad_steps"])

    def halve_lr(self) -> None:
        """Halve the learning rate of all steps from here on."""
        self.lr_scale /= 2

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """The base model's network in the place of the tuned one."""
        with self.foundation.base_view() as base:
            tuned, self.network = self.network, base
            try:
                yield
            finally:
                self.network = tuned

    def validation_step(self, batch: B, batch_idx: int) -> None:
        """Add up each term over the validation rows."""
        with self.at_own_pace():
            self._validation.add(self.validation_terms(batch))

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the last validation."""
        self._validation = Averages()

    def on_validation_epoch_end(self) -> None:
        """Average over all processes."""
        averages = {f"val/{name}": value for name, value in self._validation.over_processes().items()}
        self.log_dict(averages, prog_bar=True, logger=False)
        for logger in self.trainer.loggers:
            logger.log_metrics(averages, step=self.trainer.global_step)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: object, **__: object) -> None:
        """Clip by the global norm and keep the norm for the log; a step whose norm is not finite is left out."""
        self.grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.trained_parameters(), self.max_grad_norm))
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of float16, which skips such a step by itself
        if torch.isfinite(self.grad_norm):
            self.bad_steps, self.bad_rows = 0, []
        elif scaler is None:
            self._leave_out()

    def _leave_out(self) -> None:
        """Take no step. Raises `NumericalError` after more than `max_bad_steps` in a row; the same in every process."""
        for parameter in self.trained_parameters():
            parameter.grad = None  # AdamW passes over it
        self.bad_steps += 1
        rows = [id for part in gathered(self.bad_rows) for id in part]
        self.bad_rows = []
        where = f"rows {', '.join(rows[:8])}{' ...' if len(rows) > 8 else ''}" if rows else "its gradient"
        message = f"Step {self.trainer.global_step + 1} is not finite ({where}). It was not taken."
        if self.bad_steps > self.context.max_bad_steps:
            raise NumericalError(
                f"{message} It is number {self.bad_steps} in a row (max_bad_steps={self.context.max_bad_steps}). Lower "
                "method.lr, or look at these rows."
            )
        if self.trainer.is_global_zero:
            print(message, file=sys.stderr)

    @property
    def last_lr(self) -> float:
        """Learning rate of the step just taken."""
        return self.lr * self.lr_factor(max(self.trainer.global_step - 1, 0))

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that the optimizer changes."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with decay on matrices only; the schedule is a function of the step."""
        matrices = [p for p in self.trained_parameters() if p.ndim >= 2]
        vectors = [p for p in self.trained_parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        # One pass over memory. On CUDA it would forbid to clip in float16.
        fused = True if self.network_device.type == "cpu" else None
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=self.lr, betas=(self.betas[0], self.betas[1]), fused=fused
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at a step: linear warm-up, then the schedule down to `final_lr`."""
        total = self.trainer.max_steps
        warmup = round(self.warmup * total)
        if step < warmup:
            return self.lr_scale * (step + 1) / warmup
        done = (step - warmup) / max(total - warmup, 1)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]
        return self.lr_scale * (self.final_lr + (1 - self.final_lr) * shape)


def own_settings(node: Mapping[str, object]) -> dict[str, object]:
    """The keys of a method's config node that not all methods have: what it does to rows depends on no others."""
    shared = inspect.signature(Method.__init__).parameters
    return {key: value for key, value in node.items() if key not in shared}


@torch.no_grad()
def losses_by_row(terms: dict[str, Term], batch: Batch) -> list[float]:
    """Loss of each row of a batch: its values of every term with weight, averaged over what the row has of that kind."""
    losses = torch.zeros(len(batch["ids"]), device=batch["input_ids"].device)
    for term in terms.values():
        if term.weight and term.values.ndim:
            per_row = len(term.values) == len(losses)  # else one for each token with loss
            sums = term.values if per_row else row_sums(term.values, batch)[: len(losses)]
            sizes = torch.tensor([counts.get(term.per, 0) for counts in batch["row_counts"]], device=losses.device)
            losses += term.weight * sums / sizes.clamp(min=1)
    return losses.tolist()


class Averages:
    """Exact averages of terms over many batches and all processes; `loss` is their weighted sum."""

    def __init__(self) -> None:
        self.sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def add(self, terms: dict[str, Term]) -> None:
        """Add one batch."""
        for name, term in terms.items():
            total, size, _ = self.sums[name]
            self.sums[name] = [total + float(term.total.double()), size + term.size, term.weight]

    def over_processes(self) -> dict[str, float]:
        """Each term's average, with `loss` first; nothing when there were no terms."""
        parts = [part for part in gathered(dict(self.sums)) if part]  # a process may have had no rows
        averages = {"loss": 0.0} if parts else {}
        for name, (_, _, weight) in (parts[0] if parts else {}).items():
            averages[name] = sum(part[name][0] for part in parts) / max(sum(part[name][1] for part in parts), 1)
            averages["loss"] += weight * averages[name]
        return averages
