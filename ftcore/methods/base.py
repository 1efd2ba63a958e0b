"""What every fine-tuning method shares: exact averages, optimizer, schedule, clipping, and memory of the base model.

A method is a class with a record type, an encoding and a loss. Its loss returns sums; the base divides them by counts over
the whole optimizer step, so micro-batches, accumulation and processes never change the average ((x1/n1)+(x2/n2) is not
(x1+x2)/(n1+n2)).
"""

import math
from collections import defaultdict
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import lightning
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from ftcore.data.batches import Batch, pad
from ftcore.data.sources import Row
from ftcore.data.tokens import Encoder, Example
from ftcore.errors import NumericalError
from ftcore.logits import logits_at
from ftcore.losses import token_kl
from ftcore.model import Foundation


class Term(NamedTuple):
    """One term of a loss: a sum with gradient, what it is a sum over, and its weight in the total."""

    total: Tensor
    size: int
    weight: float = 1.0


class Method(lightning.LightningModule):
    """Base class of all methods.

    Args:
        foundation: network and tokenizer, adapter applied.
        total_steps: optimizer steps of the run, from the data's length.
    """

    record_type: ClassVar[str]
    architecture: ClassVar[str] = "CausalLM"

    def __init__(
        self,
        foundation: Foundation,
        /,
        *,
        lr: Annotated[float, Gt(0)],
        weight_decay: Annotated[float, Ge(0)],
        betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]],
        schedule: Literal["constant", "linear", "cosine"],
        warmup: Annotated[float, Ge(0), Le(1)],
        final_lr: Annotated[float, Ge(0), Le(1)],
        max_grad_norm: Annotated[float, Gt(0)],
        retention_weight: Annotated[float, Ge(0)],
        retention_every: Annotated[int, Ge(1)],
        retention_rows: Annotated[int, Ge(1)],
        retention_length: Annotated[int, Ge(2)],
        retention_text: str,
    ) -> None:
        super().__init__()
        self.foundation, self.network = foundation, foundation.network
        self.lr, self.weight_decay, self.betas = lr, weight_decay, betas
        self.schedule, self.warmup, self.final_lr, self.max_grad_norm = schedule, warmup, final_lr, max_grad_norm
        self.retention_weight, self.retention_text = retention_weight, retention_text
        self.retention_every, self.retention_rows, self.retention_length = (
            retention_every,
            retention_rows,
            retention_length,
        )
        self.total_steps = 0
        self.step_metrics: dict[str, Tensor] = {}
        self.grad_norm = torch.tensor(0.0)
        if retention_weight:
            foundation.keep_base()

    # What a method defines.

    def encode(self, encoder: Encoder, rows: list[Row]) -> list[Example]:
        """Rows to token sequences with their loss masks."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> dict[str, Term]:
        """Terms of the loss of one micro-batch, as sums."""
        raise NotImplementedError

    def counts(self, example: Example) -> dict[str, int]:
        """What an example adds to each term's count, known from its mask alone."""
        raise NotImplementedError

    def collate(self, examples: list[Example]) -> Batch:
        """Examples side by side, padded on the right."""
        return pad(examples, self.foundation.tokenizer.pad_token_id or 0)

    # What the base class does with it.

    def on_fit_start(self) -> None:
        """Put a frozen copy of the base, which is no submodule, where the network is."""
        if self.foundation.frozen_copy is not None:
            self.foundation.frozen_copy.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Weighted sum of each term's sum over its count in the whole step.

        Lightning divides by the number of micro-batches and data-parallel strategies by the number of processes; both are
        multiplied back, so that gradients add up to exactly sum / count.
        """
        terms = self.loss(batch)
        if "retention" in batch:
            terms["retention"] = self.retention(batch["retention"])
        shares = {name: term.total / max(batch["counts"].get(name, 0), 1) for name, term in terms.items()}
        loss = torch.stack([terms[name].weight * share for name, share in shares.items()]).sum()
        self._record(shares, loss, batch)
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def retention(self, batch: Batch) -> Term:
        """KL from the base model's next-token distribution on general text: what keeps it from forgetting."""
        positions = batch["completion_mask"]
        with torch.no_grad(), self.foundation.base_view() as base:
            reference = logits_at(base, batch, positions)
        divergence = token_kl(logits_at(self.network, batch, positions), reference)
        return Term(divergence, len(reference), self.retention_weight)

    def _record(self, shares: dict[str, Tensor], loss: Tensor, batch: Batch) -> None:
        if not torch.isfinite(loss):
            raise NumericalError(
                f"The loss is {loss.item()} at step {self.trainer.global_step + 1}, rows {', '.join(batch['ids'][:8])}. No step "
                "was taken with it. Lower method.lr, or look at these rows."
            )
        for name, value in {"loss": loss, **shares}.items():
            self.step_metrics[name] = self.step_metrics.get(name, torch.zeros((), device=value.device)) + value.detach()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log each term's exact average over the validation rows."""
        for name, term in self.loss(batch).items():
            self._weights[name] = term.weight
            self._validation[name] += torch.tensor([term.total.item(), term.size], dtype=torch.float64)

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the last validation."""
        self._weights: dict[str, float] = {}
        self._validation: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def on_validation_epoch_end(self) -> None:
        """Average over all processes."""
        averages: dict[str, float] = {}
        for name, sums in self._validation.items():
            total, count = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
            averages[f"val/{name}"] = (total / count).item()
            averages["val/loss"] = averages.get("val/loss", 0.0) + self._weights[name] * averages[f"val/{name}"]
        self.log_dict(averages, prog_bar=True, logger=False)
        for logger in self.trainer.loggers:
            logger.log_metrics(averages, step=self.trainer.global_step)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip by the global norm and keep the norm for the log."""
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.trained_parameters(), self.max_grad_norm)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of float16, which skips such a step by itself
        if scaler is None and not torch.isfinite(self.grad_norm):
            raise NumericalError(
                f"The gradient is not finite at step {self.trainer.global_step + 1}. The step was not taken. Lower method.lr."
            )

    @property
    def last_lr(self) -> float:
        """Learning rate of the step just taken."""
        return self.lr * self.lr_factor(max(self.trainer.global_step - 1, 0))

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that the optimizer changes."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices only; the schedule is a function of the step."""
        matrices = [p for p in self.trained_parameters() if p.ndim >= 2]
        vectors = [p for p in self.trained_parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=self.lr, betas=(self.betas[0], self.betas[1])
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at a step: linear warm-up, then the schedule down to `final_lr`."""
        warmup = round(self.warmup * self.total_steps)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(self.total_steps - warmup, 1)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]
        return self.final_lr + (1 - self.final_lr) * shape
