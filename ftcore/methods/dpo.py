"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

loss = -log sigmoid(r(chosen) - r(rejected)), r(y) = beta (log p(y) - log p_ref(y)), averaged over the pairs of the step. With
label smoothing e: (1 - e) of it plus e of the same with the answers swapped (Mitchell 2023, "conservative DPO").
"""

from typing import Annotated

from annotated_types import Ge, Lt
from torch import Tensor

from ftcore.methods.losses import bradley_terry
from ftcore.methods.preference import Answers, PreferenceMethod


class DPO(PreferenceMethod):
    """Raises the chosen answer over the rejected one, relative to the base model."""

    has_reference = True
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)]

    def pair_loss(self, chosen: Answers, rejected: Answers) -> Tensor:
        """Logistic loss of the reward margin, (P,)."""
        return bradley_terry(self.reward(chosen), self.reward(rejected), smoothing=self.label_smoothing)
