"""The transformer blocks of a network, whatever its architecture calls them."""

from collections.abc import Sequence

from torch.nn import Module, ModuleList


def transformer_blocks(network: Module) -> Sequence[Module]:
    """The list of transformer blocks: the longest ModuleList of the network; empty for a mere layer."""
    return list(max((m for m in network.modules() if isinstance(m, ModuleList)), key=len, default=()))
