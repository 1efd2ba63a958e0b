"""Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7): one stage instead of SFT, then DPO.

loss = -mean log p(token of chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds(y) = p / (1 - p),
p = exp(mean log-probability of y's tokens). The likelihood is over the answer; the authors' code takes the prompt in too.
"""

from torch import Tensor

from ftcore.methods.losses import bradley_terry, log_odds
from ftcore.methods.preference import Answers, PreferenceMethod


class ORPO(PreferenceMethod):
    """Likelihood of the chosen answer plus its odds against the rejected one's."""

    nll_weight, per_token = 1.0, True

    def pair_loss(self, chosen: Answers, rejected: Answers) -> Tensor:
        """beta times the logistic loss of the log odds ratio, (P,)."""
        better, worse = (log_odds(side.logps / side.lengths.clamp(min=1)) for side in (chosen, rejected))
        return self.beta * bradley_terry(better, worse)
