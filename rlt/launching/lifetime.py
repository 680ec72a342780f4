"""Processes that end with the one that started them."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PREEMPTED = 75  # exit code of a run that was stopped and saved (EX_TEMPFAIL): the same command continues it
REFUSED = 78  # of a rank that can never work (EX_CONFIG), whose launcher makes 1 of it

PR_SET_PDEATHSIG = 1  # linux/prctl.h
TIDY_UP_S = 5.0
LAST_LINES = 15
SHARED_MEMORY = Path("/dev/shm")
SEGMENTS = ("psm_", "sem.mp-")  # as multiprocessing names them


def stop_signals() -> list[signal.Signals]:
    """What asks a run to save and stop: SIGTERM, Ctrl-C, and a lost terminal where `nohup` did not say to go on."""
    lost = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if lost else [])]


def end_of(log: Path) -> str:
    """The last lines of a log that say something."""
    text = log.read_bytes().decode(errors="replace").replace("\r", "\n") if log.is_file() else ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-LAST_LINES:])


def end_with(launcher: int) -> None:
    """However the launcher ends, this process does not stay behind; it holds for what the process becomes, too."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        sys.exit(1)


def has_ended(pid: int) -> bool:
    """Whether a child has ended that is yet to be waited for: until then its id cannot be another's."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def end_group(process: subprocess.Popen) -> None:
    """End the group of a leader that was not yet waited for, so that the group's id cannot be another's."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def end_followers(process: subprocess.Popen) -> None:
    """The same once the leader has ended: what it started may tidy up (shared memory, for one) before it is killed."""
    followers = _followers(process.pid)
    segments = set().union(*map(_segments_of, followers))
    for pid in followers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    give_up = time.monotonic() + TIDY_UP_S
    while _followers(process.pid) and time.monotonic() < give_up:
        time.sleep(0.1)
    end_group(process)
    for segment in segments:
        segment.unlink(missing_ok=True)


def _segments_of(pid: int) -> set[Path]:
    """Python's shared memory and semaphores that a process has mapped."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:  # it has just ended
        return set()
    mapped = (Path(words[5]) for words in map(str.split, lines) if len(words) > 5)
    return {path for path in mapped if path.parent == SHARED_MEMORY and path.name.startswith(SEGMENTS)}


def _followers(leader: int) -> list[int]:
    """Living processes of a group but for its leader."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(group) == leader and state != "Z" and int(path.parent.name) != leader:
            found.append(int(path.parent.name))
    return found
