"""Freed memory goes back to the system between phases, so that a long run on the CPU does not creep upwards.

Batches have other shapes every time, and the C library keeps the gaps between what is still in use.
"""

import ctypes

from transformers import TrainerCallback

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)


def return_freed_memory() -> None:
    """glibc's `malloc_trim`; nothing where the C library has no such call."""
    if _TRIM is not None:
        _TRIM(0)


class ReturnFreedMemory(TrainerCallback):
    """At each end of a step. More often would cost more: what is given back is faulted in again, page by page."""

    def on_step_end(self, args, state, control, **kwargs):
        return_freed_memory()
