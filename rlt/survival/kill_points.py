"""Marked places where a test may end or stop a run, as a power cut or a scheduler would."""

import os
import signal

KILL_VARIABLE = "RLT_KILL_AT"  # "saving:2" kills the process when that point is reached for the second time
# "saving:2:SIGTERM" sends the signal to the process that started this one; several are parted by commas.
SIGNAL_VARIABLE = "RLT_SIGNAL_AT"
RANK_VARIABLE = "RLT_KILL_RANK"  # of several processes, the one that is meant; 0 unless set
RESTART_VARIABLE = "TORCHELASTIC_RESTART_COUNT"  # of the ranks, set by PyTorch's elastic agent
_reached: dict[str, int] = {}


def kill_point(name: str) -> None:
    """A marked place where a test may end the process, as a power cut would, or have it asked to stop."""
    if os.environ.get("RANK", "0") != os.environ.get(RANK_VARIABLE, "0"):
        return
    if os.environ.get(RESTART_VARIABLE, "0") != "0":  # what was killed once is to go on
        return
    _reached[name] = _reached.get(name, 0) + 1
    here = [name, str(_reached[name])]
    wanted, _, times = os.environ.get(KILL_VARIABLE, "").partition(":")
    if [wanted, times or "1"] == here:
        os.kill(os.getpid(), signal.SIGKILL)
    for wish in os.environ.get(SIGNAL_VARIABLE, "").split(","):
        *place, number = wish.split(":")
        if place == here:
            os.kill(os.getppid(), signal.Signals[number])
