"""The transformer blocks of a network, whatever its architecture calls them."""

from torch.nn import Module, ModuleList


def transformer_blocks(network: Module) -> list[Module]:
    """The longest ModuleList of the network; empty for a single layer."""
    return list(max((m for m in network.modules() if isinstance(m, ModuleList)), key=len, default=()))
