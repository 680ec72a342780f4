"""Where weights lie for a process that reads them on the same machine."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

SHARED_MEMORY = Path("/dev/shm")


def weights_folder(size: int = 0) -> TemporaryDirectory:
    """In shared memory where that has room for two times `size` bytes (a container's often has not)."""
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * size
    return TemporaryDirectory(prefix="rlt-weights-", dir=os.environ.get("TMPDIR") or (SHARED_MEMORY if roomy else None))
