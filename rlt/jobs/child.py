"""A run inside a run: a pipeline's stage, a warm-up, one job of a sweep.

Everybody on a machine may read a process's command line, and only its user its environment: a secret goes there.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from functools import partial

from rlt.launching.lifetime import PREEMPTED, end_with, stop_signals
from rlt.places import ROOT, SECRETS_VARIABLE
from rlt.runs.hidden import is_secret

logger = logging.getLogger("rlt")


def secret_overrides() -> list[str]:
    """What `run_child` kept out of this process's command line; what this process starts does not inherit it."""
    return json.loads(os.environ.pop(SECRETS_VARIABLE, "[]"))


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
            [sys.executable, str(ROOT / arguments[0]), *(word for word in arguments[1:] if not is_secret(word))],
            env={**os.environ, SECRETS_VARIABLE: json.dumps([word for word in arguments[1:] if is_secret(word)])},
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
