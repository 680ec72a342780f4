"""A run that is asked to stop (SIGTERM, Ctrl-C, a lost terminal) ends what it is at, saves, and stops; asked again,
at once."""

import logging
import os
import signal
import sys

import psutil

from rlt.launching.lifetime import PREEMPTED, stop_signals

PEERS_VARIABLE = "RLT_ENDS_WITH_PEERS"  # set where SIGTERM also comes when another rank has died: under torchrun

logger = logging.getLogger("rlt")


def is_a_peer_gone() -> bool:
    """Whether fewer ranks of this machine live than were started: processes of one parent with one command."""
    mine = psutil.Process()
    try:
        parent = mine.parent()
        beside = [p for p in (parent.children() if parent else ()) if p.status() != psutil.STATUS_ZOMBIE]
        alive = [p for p in beside if p.cmdline() == mine.cmdline()]
    except psutil.NoSuchProcess:  # it has just ended
        return True
    return len(alive) < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class StopOnSignal:
    """Listens inside its `with` block."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in stop_signals()}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if PEERS_VARIABLE in os.environ and not self.asked and is_a_peer_gone():
            logger.warning("another rank has ended: nothing is saved, as that takes all of them")
            os._exit(128 + number)
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C; SIGTERM may come from many sides

    def asked_anywhere(self) -> bool:
        """Whether any rank was asked; all ranks call it together."""
        import torch
        from accelerate import PartialState
        from accelerate.utils import gather

        return bool(gather(torch.tensor([self.asked], device=PartialState().device)).any())

    def leave_together(self) -> None:
        """For runs that train nothing, once each rank has ended its part of the work or was asked to stop."""
        if self.asked_anywhere():
            sys.exit(PREEMPTED)
