"""A run inside a run: a pipeline's stage, a warm-up, one job of a sweep."""

import logging
import os
import signal
import subprocess
import sys
import threading
from functools import partial

from rlt.launching.lifetime import PREEMPTED, end_with, stop_signals
from rlt.places import ROOT

logger = logging.getLogger("rlt")


def run_child(arguments: list[str]) -> None:
    """One of the project's scripts with its arguments, in a process that gets our signals and ends with this one.

    Exits as that process does, when it fails or was asked to stop.
    """
    asked = threading.Event()
    process: subprocess.Popen | None = None

    def pass_on(number: int, _) -> None:
        asked.set()
        if process is not None:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        # In a session of its own, so that Ctrl-C reaches it once.
        process = subprocess.Popen(
            [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
            start_new_session=True,
            preexec_fn=partial(end_with, os.getpid()),
        )
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        if code < 0:  # else it has said its line
            logger.error("ended by %s; the same command continues where it stopped", signal.Signals(-code).name)
        sys.exit(code if code > 0 else 128 - code)
    if asked.is_set():
        sys.exit(PREEMPTED)
