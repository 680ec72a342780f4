"""Processes that end with the one that started them."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType

import psutil

PREEMPTED = 75  # exit code of a run that was stopped and saved (EX_TEMPFAIL): the same command continues it
REFUSED = 78  # of a rank that can never work (EX_CONFIG), whose launcher makes 1 of it

PR_SET_PDEATHSIG = 1  # linux/prctl.h
TIDY_UP_S, POLL_S = 5.0, 0.02
LAST_LINES = 15
SHARED_MEMORY = Path("/dev/shm")
TRACKER = "multiprocessing.resource_tracker"  # in its command line


def stop_signals() -> list[signal.Signals]:
    """What asks a run to save and stop: SIGTERM, Ctrl-C, and a lost terminal where `nohup` did not say to go on."""
    lost = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if lost else [])]


def end_of(log: Path) -> str:
    """The last lines of a log that say something."""
    text = log.read_bytes().decode(errors="replace").replace("\r", "\n") if log.is_file() else ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-LAST_LINES:])


def last_words(folder: Path, rank: int | str) -> Path:
    """Where a rank says why it ends, beside its log: in its launcher's own folder."""
    return folder / f"rank-{rank}.txt"


def keep_last_words(file: Path, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Why this rank ends, also where its log cannot be written."""
    text = "".join(traceback.format_exception(kind, error, trace))
    file.write_text(text, encoding="utf-8", errors="backslashreplace")
    sys.stderr.write(text)


def end_with(launcher: int) -> None:
    """However the launcher ends, this process does not stay behind; it holds for what the process becomes, too."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        sys.exit(1)


@contextlib.contextmanager
def ends_within(limit_s: float, what: str) -> Iterator[Callable[[float], None]]:
    """A block that may stand still inside a library, where no exception reaches it: past its limit the process ends,
    with code 1, and its launcher does with it as with any that failed.

    Yields:
        What sets another limit, from now on in seconds; for other threads, too. Behind the block it sets none.
    """
    timers: list[threading.Timer] = []
    inside, lock = threading.Event(), threading.Lock()

    def end(seconds: float) -> None:
        sys.stderr.write(f"{what} took longer than {seconds:.1f} s: this process ends\n")
        sys.stderr.flush()
        os._exit(1)

    def limit(seconds: float) -> None:
        with lock:
            if not inside.is_set():
                return
            timers.append(threading.Timer(seconds, end, [seconds]))
            timers[-1].daemon = True
            timers[-1].start()

    inside.set()
    limit(limit_s)
    try:
        yield limit
    finally:
        with lock:
            inside.clear()
        for timer in timers:
            timer.cancel()


def has_ended(pid: int) -> bool:
    """Whether a child has ended that is yet to be waited for: until then its id cannot be another's."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def end_group(process: subprocess.Popen) -> None:
    """End the group of a leader that was not yet waited for, so that the group's id cannot be another's."""
    if process.returncode is None:
        _kill(_members(process.pid))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what was forked meanwhile


def end_followers(process: subprocess.Popen) -> None:
    """The same once the leader has ended: what it started may tidy up before it is killed."""
    _ask_to_end(_members(process.pid))
    end_group(process)


def end_abandoned(group: int) -> None:
    """A group whose launcher has ended, and cannot wait for its leader."""
    members = _members(group)
    _ask_to_end(members)
    _kill(members)


def _ask_to_end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _wait_for(processes)


def _kill(processes: list[psutil.Process]) -> None:
    """Python's resource trackers go last, by themselves: they remove the shared memory of processes that were killed,
    now or before, once none is left that has used it."""
    trackers = kill_all_but_trackers(processes)
    _wait_for(trackers)
    for process in trackers:
        _kill_one(process)


def kill_all_but_trackers(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The trackers among them, which live on. A process that lost its own would start another, which knows none of the
    names that it is then told to remove, and says so at length."""
    trackers = []
    for process in processes:
        if _is_tracker(process):
            trackers.append(process)
        else:
            _kill_one(process)
    return trackers


def _kill_one(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def _is_tracker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):  # it has just ended
        return any(TRACKER in word for word in process.cmdline())
    return False


def _wait_for(processes: list[psutil.Process]) -> None:
    """Return once none of them runs, or after a while; an ended one may stay a zombie where nobody waits for it."""
    give_up = time.monotonic() + TIDY_UP_S
    while any(map(_runs, processes)) and time.monotonic() < give_up:
        time.sleep(POLL_S)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):  # it has just ended
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _members(group: int) -> list[psutil.Process]:
    """The living processes of a group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):  # it has just ended, or is not ours
            if os.getpgid(process.pid) == group and _runs(process):
                found.append(process)
    return found


def is_stopped(leader: int) -> bool:
    """Whether some process of a group is held by SIGSTOP, or by a debugger."""
    held = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    with contextlib.suppress(psutil.Error):  # it has just ended
        return any(process.status() in held for process in _members(leader))
    return False


def is_held(pid: int) -> bool:
    """Whether a process is held by SIGSTOP; one under a debugger is not."""
    with contextlib.suppress(psutil.Error):  # it has just ended
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False
