"""Where a frozen model waits between its phases."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def resident(model: torch.nn.Module, device: torch.device, offload: bool) -> Iterator[torch.nn.Module]:
    """The whole model on `device` for the duration; back in the CPU's memory afterwards when `offload` is on."""
    model.to(device)
    try:
        yield model
    finally:
        if offload and torch.device(device).type == "cuda":
            model.to("cpu")
            torch.cuda.empty_cache()
