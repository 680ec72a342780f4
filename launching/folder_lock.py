"""One run at a time in an output folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import Refused


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold a folder, which is made where it is missing; whatever ends the process lets go of it.

    Raises:
        Refused: another run holds it, it cannot be made or written to, or it is a file.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise Refused(f"output_dir={folder} cannot be made or opened ({error}): choose another") from error
    try:
        if not os.access(folder, os.W_OK, effective_ids=True):
            raise Refused(f"output_dir={folder} cannot be written to: choose another")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"output_dir={folder} is in use by another run: wait for it, or choose another") from None
        yield
    finally:
        os.close(handle)
