"""A process whose log is on a full or read-only disk goes on without it."""

import errno
import io
import sys

LOST = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class LossyFile(io.FileIO):
    """Drops what its disk does not take."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in LOST:
                raise
            return len(data)


def speak_on() -> None:
    """Standard output and errors of this process no longer end it."""
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(LossyFile(number, "w", closefd=False)), "utf-8", "backslashreplace", line_buffering=True
        )
        for number in (1, 2)
    )
