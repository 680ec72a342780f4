"""Where weights lie for a process that reads them on the same machine."""

import os
import shutil
import tempfile
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
WEIGHTS_VARIABLE = "RLT_WEIGHTS_FOLDER"  # where servers of a run find them, made and removed by its launcher


def weights_folder(size: int = 0) -> Path:
    """A new folder, in shared memory where that has room for two times `size` bytes (a container's often has not)."""
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * size
    wanted = os.environ.get("TMPDIR") or (SHARED_MEMORY if roomy else None)
    return Path(tempfile.mkdtemp(prefix="rlt-weights-", dir=wanted))
