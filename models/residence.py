"""Where a frozen model waits between its phases: on the CPU, and it moves whole, not layer by layer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def _is_on(model: torch.nn.Module, device: torch.device) -> bool:
    here = next(model.parameters()).device
    return here.type == device.type and device.index in (None, here.index)


@contextmanager
def resident(model: torch.nn.Module, device: torch.device | str, offload: bool) -> Iterator[torch.nn.Module]:
    """The whole model on `device` for the duration.

    Args:
        model: frozen; one that is on `device` already stays there, before and after (so uses may be nested).
        device: where it computes.
        offload: back into the CPU's memory afterwards, also after an exception; False leaves it on `device`.

    Returns:
        a context that gives the model.
    """
    device = torch.device(device)
    if _is_on(model, device):
        yield model
        return
    model.to(device)
    try:
        yield model
    finally:
        if offload:
            model.to("cpu")
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()
