"""Contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417, eq. 5 and 6): DPO with a uniform reference.

loss = -log sigmoid(beta (log p(chosen) - log p(rejected))) - nll_weight * mean log p(token of chosen).
"""

from ftcore.methods.base import NonNegative
from ftcore.methods.dpo import DPO


class CPO(DPO):
    """DPO without a reference model; the likelihood of the chosen answer is part of the loss."""

    has_reference = False
    nll_weight: NonNegative
