"""Temporary folders that know their owner, so that what a process left that was killed is removed by the next one.

A launcher's watchdog removes its folders where the launcher is killed; this is for those whose watchdog was killed too.
"""

import json
import logging
import os
import shutil
import stat
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rlt.durable import read_json
from rlt.launching.lifetime import SHARED_MEMORY

PREFIX = "rlt-"
LAUNCH, SERVE, WEIGHTS = (f"{PREFIX}{name}-" for name in ("launch", "serve", "weights"))
SERVICE, WORKER, ADAPTERS = (f"{PREFIX}{name}-" for name in ("service", "worker", "adapters"))  # of the training API
OWNER = "owner.json"
ENDED = ("Z", "X")  # states of a process that runs no more (proc_pid_stat(5))

logger = logging.getLogger("rlt")


@dataclass(frozen=True)
class Owner:
    """A process, so that no other is taken for it: numbers come again, also by the next boot of a machine.

    Args:
        host, boot, namespace: where `pid` is its number.
        started: clock ticks from the boot to its start.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: int


def this_process() -> Owner:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    started = started_at(os.getpid())
    assert started is not None  # it runs
    return Owner(os.uname().nodename, boot, os.readlink("/proc/self/ns/pid"), os.getpid(), started)


def started_at(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None where there is none that runs."""
    try:
        said = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    words = said.rpartition(")")[2].split()  # from the third on (proc_pid_stat(5))
    return None if words[0] in ENDED else int(words[19])


def is_gone(owner: Owner) -> bool:
    """Whether a process has surely ended: of another machine or another container nothing can be said."""
    here = this_process()
    if owner.boot != here.boot:
        return owner.host == here.host
    return owner.namespace == here.namespace and started_at(owner.pid) != owner.started


def owned_folder(prefix: str, place: Path | str | None = None) -> tempfile.TemporaryDirectory:
    """A temporary folder of this process. What others left that were killed is removed first.

    Args:
        place: None: where temporary folders are.
    """
    for top in {Path(place or tempfile.gettempdir()), Path(tempfile.gettempdir()), SHARED_MEMORY}:
        sweep(top)
    folder = tempfile.TemporaryDirectory(prefix=prefix, dir=place)
    (Path(folder.name) / OWNER).write_text(json.dumps(asdict(this_process())), encoding="utf-8")
    return folder


def sweep(place: Path) -> None:
    """Remove this user's folders whose owners have ended."""
    for folder in place.glob(f"{PREFIX}*"):
        if _is_mine(folder) and _is_left(folder):
            logger.warning("%s is removed: the process that made it was killed", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _is_mine(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:  # its owner has just removed it
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _is_left(folder: Path) -> bool:
    found = read_json(folder / OWNER)
    fields = Owner.__dataclass_fields__.keys()
    return isinstance(found, dict) and found.keys() == fields and is_gone(Owner(**found))
