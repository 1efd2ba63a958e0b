"""Number formats: of weights in memory, and of what is computed.

What trains is float32 in every precision, whatever the checkpoint holds, and so are its gradients and the optimizer's moments: a
step of 1e-5 is below the last digit of most bf16 weights, and would be lost. `bf16-true` keeps in bf16 what is frozen: half the
memory, and nothing to cast. It multiplies as `bf16-mixed` does.
"""

from typing import Literal

import torch

from ftcore.models.sharding import replace_parameters
from ftcore.settings import Precision


def cast_weights(network: torch.nn.Module, precision: Precision) -> None:
    """Make trained weights float32, and frozen ones as `precision` keeps them. Quantised weights and buffers stay as they are."""
    frozen = torch.bfloat16 if precision == "bf16-true" else torch.float32

    def cast(weight: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if weight.requires_grad else frozen
        return weight.to(dtype) if weight.is_floating_point() else weight

    replace_parameters(network, cast)


def computing_in(precision: Precision, device: str) -> torch.autocast:
    """The context in which networks compute in `precision` on a kind of device, outside Lightning's Trainer."""
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    return torch.autocast(device, half, enabled=precision != "32-true", cache_enabled=False)


def of_trainer(precision: Precision) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """Lightning's name for it. Its own bf16-true would round what trains and every float of a batch, such as returns."""
    return "bf16-mixed" if precision == "bf16-true" else precision


def forbid_tf32() -> None:
    """Let GPUs multiply float32 numbers in full, not as TF32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
