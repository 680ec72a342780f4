"""Where weights lie for a process that reads them on the same machine."""

import os
import shutil
from tempfile import TemporaryDirectory

from rlt.launching.lifetime import SHARED_MEMORY
from rlt.launching.owned import WEIGHTS, owned_folder


def weights_folder(size: int = 0) -> TemporaryDirectory:
    """In shared memory where that has room for two times `size` bytes (a container's often has not)."""
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * size
    return owned_folder(WEIGHTS, os.environ.get("TMPDIR") or (SHARED_MEMORY if roomy else None))
