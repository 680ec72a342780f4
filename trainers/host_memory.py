"""Freed memory goes back to the system after each step, so that a long run on the CPU does not creep upwards.

Steps have other shapes every time, and the C library keeps the gaps between what is still in use.
"""

import ctypes

from transformers import TrainerCallback


class ReturnFreedMemory(TrainerCallback):
    """glibc's `malloc_trim` at each end of a step; nothing where the C library has no such call."""

    def __init__(self):
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def on_step_end(self, args, state, control, **kwargs):
        if self._trim is not None:
            self._trim(0)
