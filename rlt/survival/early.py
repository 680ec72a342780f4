"""A signal to stop that comes while a command is still importing, when nothing has begun, or while it is ending."""

import atexit
import os
import signal

from rlt.launching.lifetime import PREEMPTED, stop_signals


def end_when_asked() -> None:
    """Until something else listens, a signal to stop ends this process with `PREEMPTED`, at once."""
    for number in stop_signals():
        signal.signal(number, lambda *_: os._exit(PREEMPTED))
    atexit.register(_ignore)


def _ignore() -> None:
    """An interpreter that ends gives signals back to the kernel, by which a second one would change the exit code."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
