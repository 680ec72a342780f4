"""Folders for the time that a process runs; of one that was killed, the next such process removes them."""

import os
import shutil
import tempfile
from pathlib import Path

import psutil


def scratch_folder(purpose: str) -> tempfile.TemporaryDirectory:
    """Of this process, gone with it or after it."""
    prefix = f"rlt-{purpose}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        pid = left.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)) and left.stat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)  # another such process may remove it too
    return tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-")
