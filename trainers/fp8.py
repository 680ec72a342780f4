"""Products of large layers in FP8 (arXiv 2209.05433), by torchao: e4m3 values and weights, e5m2 gradients.

Small products lose: below FLOATS_OF_A_LAYER weights casting takes longer than the faster product saves, and a model
under about a billion parameters gains nothing. `emulate` computes the same values on any device, without being faster.
"""

from collections.abc import Callable

import torch
from torch import nn

from rlt.errors import Refused

MULTIPLE = 16  # that FP8 products need of both dimensions
CAPABILITY = (8, 9)  # Ada and Hopper
FLOATS_OF_A_LAYER = 2**22


def takes_fp8(model: nn.Module, smallest: int = FLOATS_OF_A_LAYER) -> Callable[[nn.Module, str], bool]:
    """Which modules change: linear layers of the right shape that are large, but not the first and the last."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ends = {*names[:1], *names[-1:]}

    def takes(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or name in ends:
            return False
        fits = module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
        return fits and module.in_features * module.out_features >= smallest

    return takes


def compute_in_fp8(model: nn.Module, emulate: bool, smallest: int = FLOATS_OF_A_LAYER) -> int:
    """Convert a model in place.

    Returns:
        how many layers were converted.

    Raises:
        Refused: the device has no FP8, or no layer is large enough.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # pyrefly: ignore[missing-import]

    if not emulate and not has_fp8():
        raise Refused(
            "fp8=true: this device has no FP8, which takes an NVIDIA GPU of capability 8.9: set emulate, or false"
        )
    takes = takes_fp8(model, smallest)
    count = sum(takes(module, name) for name, module in model.named_modules())
    if not count:
        raise Refused(f"fp8: no layer of this model has {smallest:,} weights or more, of which FP8 would be faster")
    convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=takes)
    return count


def has_fp8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY
