"""Terms of a loss: sums with what they are divided by, and their averages over rows, batches and processes."""

from typing import NamedTuple

import torch
from torch import Tensor

from ftcore.data.layouts import Batch
from ftcore.machine.processes import gathered
from ftcore.models.logprobs import row_sums

# A score of each row; None where a row has none.
ByRow = list[float | None]


class Term(NamedTuple):
    """One term of a loss.

    `values` holds one value per token with loss or per row, or their sum. `size` is how many things they were summed over, and
    `per` what these are: a key of `counts`. A term of weight 0 is a metric: averaged and logged like the others.
    """

    values: Tensor  # (N,), (S,), (P,) or ()
    size: int
    per: str
    weight: float = 1.0

    @property
    def total(self) -> Tensor:
        """The sum of the values."""
        return self.values.sum()


def metrics(per: str, values: dict[str, Tensor]) -> dict[str, Term]:
    """Terms of weight 0, without gradient, from tensors that hold one value for each `per`."""
    return {name: Term(value.detach(), len(value), per, 0.0) for name, value in values.items()}


def by_row(term: Term, batch: Batch) -> Term:
    """A term in float64 on the host with one value for each row of a batch, or with their sum where it cannot be told apart."""
    values = term.values.cpu().double()
    return term._replace(values=_sums_by_row(values, batch) if values.ndim else values)


def _sums_by_row(values: Tensor, batch: Batch) -> Tensor:
    """Of `values`, one of each token or row: a sum (rows,) for each row; () where it cannot be told apart."""
    rows = len(batch["ids"])
    if len(values) == rows:
        return values
    per_token = len(values) == batch["trained"].shape[1]
    return row_sums(values, batch)[:rows] if per_token else values.sum()


@torch.no_grad()
def losses_by_row(terms: dict[str, Term], batch: Batch) -> Tensor:
    """Loss (rows,) of each row of a batch: the weighted sum of its terms, each averaged over that row's own count."""
    losses = torch.zeros(len(batch["ids"]), device=batch["input_ids"].device)
    for term in terms.values():
        sums = _sums_by_row(term.values, batch) if term.values.ndim else term.values
        if term.weight and sums.ndim:
            sizes = torch.tensor([max(counts.get(term.per, 0), 1) for counts in batch["row_counts"]])
            losses += term.weight * sums / sizes.to(losses.device, non_blocking=True)
    return losses


class Averages(dict[str, tuple[float, int, float]]):
    """Total, size and weight of terms over many batches; their exact averages over all processes."""

    def add(self, terms: dict[str, Term]) -> None:
        """Add one batch."""
        for name, term in terms.items():
            total, size, _ = self.get(name, (0.0, 0, 0.0))
            self[name] = total + float(term.total), size + term.size, term.weight

    def over_processes(self) -> dict[str, float]:
        """Each term's average, with `loss` first, their weighted sum; empty if there were no terms."""
        parts = [part for part in gathered(dict(self)) if part]  # a process may have had no rows
        averages = {"loss": 0.0} if parts else {}
        for name, (_, _, weight) in (parts[0] if parts else {}).items():
            averages[name] = sum(part[name][0] for part in parts) / max(sum(part[name][1] for part in parts), 1)
            averages["loss"] += weight * averages[name]
        return averages
