"""A run that is asked to stop (SIGTERM, Ctrl-C, a lost terminal) ends what it is at, saves, and stops; asked again,
at once."""

import logging
import os
import signal
import sys
from collections.abc import Callable

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
    """Listens inside its `with` block.

    Until `begin` nothing is worth saving, and a signal ends the process at once: one that is alone by an exception, so
    that what it has started ends with it; ranks of one machine by whatever ended them before (the kernel), as they may
    be waiting for each other inside a library, and their launcher ends what is left. Ranks on several machines go on to
    where all of them ask, as others may not have been asked.
    """

    def __init__(self):
        self.asked = self.leaves = self.begun = False

    def __enter__(self):
        self.before = {number: signal.getsignal(number) for number in stop_signals()}
        ranks, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if ranks == 1:
            self._listen(self._leave)
        elif here < ranks:
            self._listen(self._note)
        return self

    def __exit__(self, kind, *_):
        self._listen(None)
        if self.leaves and kind is not None:
            raise SystemExit(PREEMPTED)  # whatever a library has made of the exception

    def begin(self) -> None:
        """From here on there is something to save: a signal is noted, and heard where the work can be left."""
        if self.leaves:  # a library has taken the exception
            sys.exit(PREEMPTED)
        if not self.begun:
            self.begun = True
            self._listen(self._note)

    def _listen(self, handler: Callable | None) -> None:
        """None: as before; where the process is leaving, another signal does not cut that short."""
        for number, before in self.before.items():
            signal.signal(number, handler or (signal.SIG_IGN if self.leaves else before))

    def _leave(self, number, frame) -> None:
        if not self.leaves:
            self.asked = self.leaves = True
            logger.warning("stopped before the first step: the same command begins it")
            sys.exit(PREEMPTED)

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
