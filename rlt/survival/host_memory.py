"""The C library's heap, in two opposite cases.

Training on the CPU creeps upwards: batches have other shapes every time, and the C library keeps the gaps between what
is still in use. Giving all of them back at each step would cost more than it saves: what the next step needs again is
faulted in page by page. Processes that only read and write soon need again what they free, and keep it.
"""

import ctypes
from pathlib import Path

from transformers import TrainerCallback

CREEP_BYTES = 2**29  # growth of the resident memory from one end of a step to a later one that is answered
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
_SET = getattr(ctypes.CDLL(None), "mallopt", None)
_STATM = Path("/proc/self/statm")


def return_freed_memory() -> None:
    """glibc's `malloc_trim`; nothing where the C library has no such call."""
    if _TRIM is not None:
        _TRIM(0)


def keep_freed_memory() -> None:
    """glibc keeps freed blocks below 2 GiB instead of handing them back, to fault them in again page by page: a
    forward pass over thousands of tokens takes an eighth less time for a tenth more memory. Nothing where the C library
    has no such call."""
    if _SET is not None:
        for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            _SET(threshold, 2**31 - 1)


def resident_bytes() -> int:
    """What the process holds of the machine's memory; 0 where the system does not say."""
    return int(_STATM.read_text(encoding="utf-8").split()[1]) * 4096 if _STATM.exists() else 0


class ReturnFreedMemory(TrainerCallback):
    """At the end of a step after which the process holds `CREEP_BYTES` more than after an earlier one."""

    def __init__(self):
        self.level: int | None = None  # resident bytes after the first step since memory was given back

    def on_step_end(self, args, state, control, **kwargs):
        resident = resident_bytes()
        if self.level is None:
            self.level = resident
        elif resident > self.level + CREEP_BYTES:
            return_freed_memory()
            self.level = None
