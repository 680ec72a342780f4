"""Where a frozen model waits between its phases: on the CPU, and it moves whole, not layer by layer.

A model that works on a GPU waits in pinned memory, and may be sent for while the phase before still computes. Its
weights do not change, so nothing is copied back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch

_waiting: WeakKeyDictionary[torch.nn.Module, list[torch.Tensor]] = WeakKeyDictionary()  # in pinned memory
_coming: WeakKeyDictionary[torch.nn.Module, tuple[list[torch.Tensor], torch.cuda.Event]] = WeakKeyDictionary()


def _is_on(model: torch.nn.Module, device: torch.device) -> bool:
    here = next(model.parameters()).device
    return here.type == device.type and device.index in (None, here.index)


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def send_for(model: torch.nn.Module, device: torch.device | str) -> None:
    """Begin to copy a waiting model to a GPU, beside what is computed there; `resident` waits for the rest.

    Nothing happens for other devices, and for a model that is there or on its way.
    """
    device = torch.device(device)
    if device.type != "cuda" or _is_on(model, device) or model in _coming:
        return
    if model not in _waiting:
        _waiting[model] = [tensor.data.pin_memory() for tensor in _tensors(model)]
        _put(model, _waiting[model])
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        copies = [x.to(device, non_blocking=True) for x in _waiting[model]]
        arrived = torch.cuda.Event()
        arrived.record(stream)
        _coming[model] = copies, arrived


def _put(model: torch.nn.Module, values: list[torch.Tensor]) -> None:
    for tensor, value in zip(_tensors(model), values, strict=True):
        tensor.data = value


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
    _bring(model, device)
    try:
        yield model
    finally:
        if offload:
            _send_back(model, device)


def _bring(model: torch.nn.Module, device: torch.device) -> None:
    if device.type != "cuda":
        model.to(device)
        return
    send_for(model, device)
    arrived, event = _coming.pop(model)
    stream = torch.cuda.current_stream(device)
    stream.wait_event(event)
    for tensor in arrived:
        # Another stream allocated the tensor: its memory must not be reused before this stream is done.
        tensor.record_stream(stream)
    _put(model, arrived)


def _send_back(model: torch.nn.Module, device: torch.device) -> None:
    if device.type != "cuda":
        model.to("cpu")
        return
    _put(model, _waiting[model])
    torch.cuda.empty_cache()  # for an engine that wakes up
