"""Sequence likelihood calibration (Zhao et al. 2023, arXiv:2305.10425, eq. 2), on log-ratios to the base model.

loss = max(0, 1 - (r(chosen) - r(rejected))), r(y) = beta (log p(y) - log p_ref(y)). The paper compares log-probabilities and adds
a likelihood term; with log-ratios (Liu et al. 2023, arXiv:2309.06657) the base model takes that term's place.
"""

from torch import Tensor

from ftcore.methods.preference import Answers, PreferenceMethod


class SLiC(PreferenceMethod):
    """Raises the chosen answer over the rejected one until the margin is one. Pairs beyond it no longer count."""

    has_reference = True

    def pair_loss(self, chosen: Answers, rejected: Answers) -> Tensor:
        """Hinge loss of the margin, (P,)."""
        return (1 - (self.reward(chosen) - self.reward(rejected))).clamp(min=0)
