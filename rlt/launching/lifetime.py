"""Processes that end with the one that started them."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import psutil

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
        What sets another limit, from now on in seconds; for other threads, too.
    """
    timers: list[threading.Timer] = []

    def end(seconds: float) -> None:
        sys.stderr.write(f"{what} took longer than {seconds:.1f} s: this process ends\n")
        sys.stderr.flush()
        os._exit(1)

    def limit(seconds: float) -> None:
        timers.append(threading.Timer(seconds, end, [seconds]))
        timers[-1].daemon = True
        timers[-1].start()

    limit(limit_s)
    try:
        yield limit
    finally:
        for timer in timers:
            timer.cancel()


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
    segments = _tidy_up([other for other in _members(process.pid) if other.pid != process.pid])
    end_group(process)
    for segment in segments:
        segment.unlink(missing_ok=True)


def end_abandoned(group: int) -> None:
    """A group whose launcher has ended, and cannot wait for its leader."""
    members = _members(group)
    segments = _tidy_up(members)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    for segment in segments:
        segment.unlink(missing_ok=True)


def _tidy_up(processes: list[psutil.Process]) -> set[Path]:
    """Ask them to end, and wait a little; the shared memory that they had."""
    segments = set().union(*map(_segments_of, processes))
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(processes, TIDY_UP_S)
    return segments


def _members(group: int) -> list[psutil.Process]:
    """The living processes of a group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):  # it has just ended, or is not ours
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
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


def _segments_of(process: psutil.Process) -> set[Path]:
    """Python's shared memory and semaphores that a process has mapped."""
    try:
        mapped = (Path(region.path) for region in process.memory_maps())
        return {path for path in mapped if path.parent == SHARED_MEMORY and path.name.startswith(SEGMENTS)}
    except psutil.Error:
        return set()
