"""The process that checks answers: a warm parent, and the child of it that reads what a model wrote.

The parent imports, tries a check of each kind and never sees an answer. It forks a child for each line (a socket) that
it is handed, and kills the one before: a child that hung is replaced in milliseconds. Both end with the trainer.

A child first says that it is there, in one byte. A request is its length (8 bytes) and JSON: kind, answer, row. The
reply is a double: 0 or 1, not a number where the check broke.
"""

import contextlib
import ctypes
import gc
import json
import logging
import math
import os
import resource
import signal
import socket
import struct
import sys
from pathlib import Path

LENGTH = struct.Struct("<Q")
REPLY = struct.Struct("<d")
READY = b"r"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ROOM_BYTES = 2**29  # of memory that a child may take beyond its parent's
# Of a child: no file is written, no memory image left, no process started.
LIMITS = {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 64, resource.RLIMIT_NPROC: 0}
# Exceptions that libraries raise on a model's text. Any other ends the child, which is then replaced.
BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
# What libraries do once only, in the parent, so that no child's first answer pays for it.
WARMING = [
    ("math", "\\frac{x^3}{3} + \\sin(x)", {"solution": "\\sin(x) + x^3/3"}),
    ("math", "(x+1)^2", {"solution": "x^2 + 2x + 1"}),
    ("math", "(3, \\infty) \\cup (-\\infty, 2)", {"solution": "(-\\infty, 2) \\cup (3, \\infty)"}),
    ("math", "y = 2, x = 1", {"solution": "x = 1, y = 2"}),
    ("math", "-1, 3", {"solution": "1 \\pm 2"}),
    ("math", "\\sqrt{2}", {"solution": "1.414"}),
    ("math", "\\frac{\\sqrt{2}}{2}", {"solution": "\\frac{1}{\\sqrt{2}}"}),
    ("generator", "5", {"question": "", "solution": "6", "task": "gcd", "metadata": "{}"}),
    ("expression", "4*3 - 2", {"solution": "10", "metadata": '{"numbers": [4, 3, 2]}'}),
]


def main(descriptor: int, trainer: int) -> None:
    """Fork a child for each line that comes, until the trainer ends.

    Args:
        descriptor: of the socket that lines come through.
        trainer: process id of the one that started this.
    """
    end_with(trainer)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the trainer's, which may still have a step to finish
    # Ended first where the machine runs out of memory.
    with contextlib.suppress(OSError):  # not every container allows it
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    warm_up()
    control = socket.socket(fileno=descriptor)
    control.send(READY)
    child = 0
    while True:
        asked, lines, _, _ = socket.recv_fds(control, 1, 1)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if not asked:
            return
        mine = os.getpid()
        child = os.fork()
        if child == 0:
            end_with(mine)
            control.close()
            limit_itself()
            serve(socket.socket(fileno=lines[0]))
            return
        os.close(lines[0])


def end_with(parent: int) -> None:
    """However the parent ends, this process does not stay behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def warm_up() -> None:
    from rlt.rewards.verifiers import CHECKS

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # that it has no time limit of its own is known
    for kind, answer, row in WARMING:
        CHECKS[kind](answer, row)
    gc.collect()
    gc.freeze()  # collections in a child would otherwise copy the parent's pages


def limit_itself() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    for limit, most in {resource.RLIMIT_AS: pages * resource.getpagesize() + ROOM_BYTES, **LIMITS}.items():
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))


def serve(line: socket.socket) -> None:
    """Answer one request after the other, until the line ends."""
    from rlt.rewards.verifiers import CHECKS

    line.sendall(READY)
    requests = line.makefile("rb")
    while head := requests.read(LENGTH.size):
        kind, answer, row = json.loads(requests.read(*LENGTH.unpack(head)))
        try:
            found = CHECKS[kind](answer, row)
        except BROKEN:
            found = math.nan
        except MemoryError:
            os._exit(1)  # a traceback would need more of it, and the next check would find none
        line.sendall(REPLY.pack(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
