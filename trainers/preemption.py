"""A run that is asked to stop (SIGTERM, Ctrl-C, a lost terminal) ends its step, saves a checkpoint, and stops; asked
again, at once."""

import signal
import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback

from launching import PREEMPTED
from launching.lifetime import stop_signals


class StopOnSignal(TrainerCallback):
    """Listens inside its `with` block. All ranks stop after the same step, whichever was asked."""

    def __init__(self):
        self.asked = False
        self.stopped = False  # before the run's end, with a checkpoint

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in stop_signals()}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C; SIGTERM may come from many sides

    def leave_together(self) -> None:
        """For runs that train nothing, once each rank has ended its part of the work or was asked to stop."""
        if bool(gather(torch.tensor([self.asked], device=PartialState().device)).any()):
            sys.exit(PREEMPTED)

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor([self.asked], device=PartialState().device)
        if bool(gather(asked).any()) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if self.stopped:  # as saved the state knows its best, which a run that is to go on must not be put back to
            state.best_model_checkpoint = None
