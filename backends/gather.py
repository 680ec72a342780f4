"""Named tensors, made whole one after the other by all ranks together."""

from collections.abc import Callable, Iterable

import torch

Tensors = dict[str, torch.Tensor]


def gathered(named: Iterable[tuple[str, torch.Tensor]], gather: Callable, keep: bool) -> Tensors:
    """What `gather` makes of each tensor, on the CPU.

    Args:
        keep: on this rank; the others only take part, and get nothing.
    """
    found = {}
    for name, tensor in named:
        whole = gather(tensor)
        if keep:
            found[name] = whole.cpu()
    return found
