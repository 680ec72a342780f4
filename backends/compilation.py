"""The C++ that DeepSpeed compiles when a run first needs it: by one process at a time, and nobody waits for a dead one.

PyTorch marks an extension's folder with a file while it compiles there. A process that is killed meanwhile leaves the
file behind, and every later one would wait for its end for ever. Here a lock of the kernel's, which ends with its
holder, is taken first; under it a file that no process has open is a dead one's, and is removed. PyTorch keeps the file
open, so a program that compiles without the lock is waited for, too. Who had to wait compiles again, which finds
nothing left to do unless the other one was killed.
"""

import fcntl
import os
import time
from pathlib import Path

import psutil
from torch.utils.file_baton import FileBaton

from rlt.errors import Refused

LIMIT_S = 30 * 60  # several times what DeepSpeed's largest part takes
PAUSE_S = 0.5


class Baton(FileBaton):
    """In the place of PyTorch's; its file is `lock_file_path`, the lock is held on one beside it."""

    def try_acquire(self) -> bool:
        """Wait for the turn to compile.

        Raises:
            Refused: it did not come.
        """
        deadline = time.monotonic() + LIMIT_S
        path = Path(self.lock_file_path)
        with_lock = self.handle = os.open(f"{path}.held", os.O_RDWR | os.O_CREAT, 0o644)
        while not (locks(with_lock) and super().try_acquire()):
            if locks(with_lock) and not is_open_somewhere(path):
                path.unlink(missing_ok=True)
                continue
            if time.monotonic() > deadline:
                os.close(with_lock)
                raise Refused(
                    f"{path} has kept this run from compiling for {LIMIT_S / 60:.0f} minutes: end the process that has "
                    "it open, or set TORCH_EXTENSIONS_DIR to another folder"
                )
            time.sleep(PAUSE_S)
        return True

    def release(self) -> None:
        super().release()
        os.close(self.handle)


def locks(handle: int) -> bool:
    """Whether this process has the lock now; on a file system without locks it is taken for had."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_open_somewhere(path: Path) -> bool:
    """Whether a process of this user on this machine has a file open."""
    real = os.path.realpath(path)
    for process in psutil.process_iter():
        try:
            if any(file.path == real for file in process.open_files()):
                return True
        except psutil.Error:  # it has ended, or is another user's
            continue
    return False


def compile_one_at_a_time() -> None:
    """From here on, in runs with DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return
    from torch.utils import cpp_extension  # slow

    cpp_extension.FileBaton = Baton
