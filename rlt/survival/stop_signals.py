"""A run that is asked to stop (SIGTERM, Ctrl-C, a lost terminal) ends what it is at, saves, and stops; asked again,
at once."""

import signal
import sys

from rlt.launching.lifetime import PREEMPTED, stop_signals


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
