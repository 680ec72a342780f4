"""The trainer's end of the process that checks answers (`checker_process.py`).

What a model wrote may hang, break or take over the child that reads it. So the trainer waits for a limited time, reads
eight bytes that are a number or nothing, and has the child replaced whenever it gets anything else.
"""

import contextlib
import math
import os
import select
import socket
import subprocess
import sys
import time
import weakref

from rlt.places import ROOT
from rlt.rewards.checker_process import LENGTH, READY, REPLY

START_LIMIT_S = 120.0  # for imports, on a busy machine
FORK_LIMIT_S = 10.0  # takes milliseconds
END_LIMIT_S = 10.0
STARTS = 3  # of the process in a row: one may be killed while it starts
# What the process gets of the run's environment; keys and tokens stand in none of these.
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")


class Unchecked(Exception):
    """An answer got no score; the message says what became of its check."""


class Broken(Unchecked):
    """The check raised an exception that libraries raise on what is no mathematics, or no JSON."""


class Checker:
    """Its process starts with the first question, and ends with this object."""

    def __init__(self):
        self._end: weakref.finalize | None = None  # of the parent, which forks a child for each line
        self._control: socket.socket | None = None  # to the parent
        self._line: socket.socket | None = None  # to the child
        self._said_ready = False

    def start(self) -> None:
        """Wait until there is a warm child to ask.

        Raises:
            TimeoutError, RuntimeError: the process was not ready in time, or ended.
        """
        if self._line is not None and self._said_ready and _has_word(self._line):
            self._replace_child()  # unasked: it has ended, or says what it should not
        for _ in range(STARTS):
            if self._has_child():
                return
            self._start_parent()
            self._replace_child()
        if not self._has_child():
            raise RuntimeError(
                f"the verifier's process ended {STARTS} times while it started; what it said stands above"
            )

    def ask(self, request: bytes, limit_s: float) -> float:
        """The score of an answer, 0 or 1.

        Raises:
            Unchecked: there is none after `limit_s`, or no such number came. The next question finds another child.
        """
        self.start()
        try:
            found = self._reply(LENGTH.pack(len(request)) + request, time.monotonic() + limit_s)
        except TimeoutError:
            self._replace_child()
            raise Unchecked("took too long") from None
        except OSError:
            self._replace_child()
            raise Unchecked("ended the process that checks") from None
        if math.isnan(found):
            raise Broken("broke its check")
        if found not in (0.0, 1.0):
            self._replace_child()
            raise Unchecked("was answered with what is no score")
        return found

    def _reply(self, message: bytes, give_up: float) -> float:
        line = self._line
        assert line is not None
        _wait_until(line, give_up)
        line.sendall(message)
        answer = b""
        while len(answer) < REPLY.size:
            _wait_until(line, give_up)
            part = line.recv(REPLY.size + 1 - len(answer))
            if not part:
                raise ConnectionResetError
            answer += part
        return REPLY.unpack(answer)[0] if len(answer) == REPLY.size else math.inf

    def _has_child(self) -> bool:
        """Wait for a new child's word that it is there; False where the parent has ended, or is held."""
        if self._line is None:
            return False
        if not self._said_ready:
            self._line.settimeout(FORK_LIMIT_S)
            with contextlib.suppress(OSError):
                self._said_ready = self._line.recv(len(READY)) == READY
        return self._said_ready

    def _replace_child(self) -> None:
        """The parent ends the child that is, and forks the next for a new line, which need not be waited for."""
        if self._line is not None:
            self._line.close()
        self._line, self._said_ready = None, False
        assert self._control is not None
        ours, theirs = socket.socketpair()
        with theirs, contextlib.suppress(OSError):  # the parent has ended: the next question starts another
            socket.send_fds(self._control, [READY], [theirs.fileno()])
            self._line = ours

    def _start_parent(self) -> None:
        if self._end is not None:
            self._end()
        self._control, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "rlt.rewards.checker_process", str(theirs.fileno()), str(os.getpid())]
        with theirs:
            process = subprocess.Popen(
                command,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._end = weakref.finalize(self, _end, process, self._control)
        self._control.settimeout(START_LIMIT_S)
        try:
            self._control.recv(len(READY))  # nothing where it has ended, which the next to speak to it finds
        except TimeoutError:
            raise TimeoutError(f"the verifier's process was not ready within {START_LIMIT_S:.0f} s") from None


def environment() -> dict[str, str]:
    """All that the process gets to know of the run's."""
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}


def _has_word(line: socket.socket) -> bool:
    poll = select.poll()
    poll.register(line, select.POLLIN)
    return bool(poll.poll(0))


def _wait_until(line: socket.socket, give_up: float) -> None:
    """Let the next call on the line raise `TimeoutError` at that time."""
    left = give_up - time.monotonic()
    if left <= 0:
        raise TimeoutError
    line.settimeout(left)


def _end(process: subprocess.Popen, control: socket.socket) -> None:
    control.close()
    process.kill()  # its child is ended by the kernel
    process.wait(END_LIMIT_S)
