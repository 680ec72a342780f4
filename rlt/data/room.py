"""How much memory is left for rows: a small file may hold one text a million times, and is read as a million texts."""

import resource
import sys
from pathlib import Path

import psutil

from rlt.errors import Refused

CGROUP = Path("/sys/fs/cgroup")  # of version 2: a container's own limit
ROWS_SHARE = 0.5  # of what is free: prompts and tokens of the rows come beside them
BATCH_SHARE = 0.25
GIB = 2**30


def free_bytes() -> int:
    """What this process may still take, by the machine, its container and its own limit of addresses."""
    free = [psutil.virtual_memory().available]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - psutil.Process().memory_info().vms)
    most, taken = (CGROUP / f"memory.{name}" for name in ("max", "current"))
    if most.is_file() and (text := most.read_text(encoding="utf-8").strip()).isdigit():
        free.append(int(text) - int(taken.read_text(encoding="utf-8")))
    return max(0, min(free))


class Room:
    """Counts the rows of a source as they come.

    Args:
        source: for the message.
    """

    def __init__(self, source: str):
        self.source, self.rows, self.taken = source, 0, 0
        self.free = free_bytes()

    def take(self, row: dict) -> None:
        """Another row stays in memory.

        Raises:
            Refused: it and those before leave too little.
        """
        self.rows += 1
        self.taken += sum(map(sys.getsizeof, row.values()))
        if self.taken > self.free * ROWS_SHARE:
            taken, free = self.taken / GIB, self.free / GIB
            raise Refused(
                f"{self.source}: its first {self.rows} rows take {taken:.1f} GiB, and {free:.1f} GiB were free: set "
                "dataset_size, or shorten its longest texts"
            )
