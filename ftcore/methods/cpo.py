"""Contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417, eq. 5 and 6): DPO with a uniform reference.

loss = -log sigmoid(beta (log p(chosen) - log p(rejected))) - nll_weight * mean log p(token of chosen).
"""

from typing import Annotated, Any

from annotated_types import Ge, Lt
from torch import Tensor

from ftcore.methods.losses import bradley_terry
from ftcore.methods.preference import Answers, PreferenceMethod


class CPO(PreferenceMethod):
    """Raises the chosen answer over the rejected one and keeps its likelihood, without a reference model."""

    def __init__(
        self,
        *given: Any,
        nll_weight: Annotated[float, Ge(0)],
        label_smoothing: Annotated[float, Ge(0), Lt(0.5)],
        **shared: Any,
    ) -> None:
        super().__init__(*given, **shared)
        self.nll_weight, self.label_smoothing = nll_weight, label_smoothing

    def reward(self, answers: Answers) -> Tensor:
        """beta times the log-probability."""
        return self.beta * answers.logps

    def pair_loss(self, chosen: Answers, rejected: Answers) -> Tensor:
        """Logistic loss of the margin."""
        return bradley_terry(self.reward(chosen), self.reward(rejected), smoothing=self.label_smoothing)
