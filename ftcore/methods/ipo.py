"""Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, eq. 17).

loss = (h(chosen) - h(rejected) - 1 / (2 beta))^2, h(y) = (log p(y) - log p_ref(y)) / tokens of y. The mean over tokens is the
authors' own form (as TRL notes); it keeps the margin comparable between lengths.
"""

from torch import Tensor

from ftcore.methods.preference import Answers, PreferenceMethod


class IPO(PreferenceMethod):
    """Drives the margin to 1 / (2 beta) instead of to infinity, so that it cannot overfit to certain labels."""

    has_reference = per_token = True

    def pair_loss(self, chosen: Answers, rejected: Answers) -> Tensor:
        """Squared distance of the margin from its target, (P,)."""
        return ((self.reward(chosen) - self.reward(rejected)) / self.beta - 1 / (2 * self.beta)) ** 2
