"""Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734, eq. 6): no reference model, no length bias.

loss = -log sigmoid(r(chosen) - r(rejected) - gamma), r(y) = beta / |y| log p(y).
"""

from torch import Tensor

from ftcore.methods.base import NonNegative
from ftcore.methods.losses import bradley_terry
from ftcore.methods.preference import Answers, PreferenceMethod


class SimPO(PreferenceMethod):
    """Raises the chosen answer's mean log-probability over the rejected one's by a margin."""

    per_token = True
    gamma: NonNegative

    def pair_loss(self, chosen: Answers, rejected: Answers) -> Tensor:
        """Logistic loss of the margin beyond gamma, (P,)."""
        return bradley_terry(self.reward(chosen), self.reward(rejected), self.gamma)
