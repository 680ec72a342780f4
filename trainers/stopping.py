"""When a run stops or saves outside its plan: asked by a signal, or because minutes have passed since the last save.

All ranks stop together, with a checkpoint, whichever of them was asked. Where they are amid a step (its completions
are written, its update is not made) the step is given up: the checkpoint has the run as it was before the step, which
the same command makes again.
"""

import logging
import time
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback

from rlt.survival.random_state import random_state, set_random_state
from rlt.survival.stop_signals import StopOnSignal
from trainers.checkpoints import AtomicCheckpoints

logger = logging.getLogger("rlt")


class StepGivenUp(Exception):
    """All ranks leave a step together; nothing of it is kept."""


class SaveByMinutes(TrainerCallback):
    """A checkpoint after the step in which so many minutes have passed since the last one."""

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        due = time.monotonic() - self.saved >= self.seconds
        if gather(torch.tensor([due], device=PartialState().device)).any():  # clocks differ, and saving takes all
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.monotonic()


class StopTogether(TrainerCallback):
    """Asks a `StopOnSignal` at the end of each step, and where a trainer may leave one.

    Args:
        grace_s: seconds that a run may take to stop, for the warning that it may need more.
    """

    def __init__(self, stop: StopOnSignal, grace_s: float):
        self.stop, self.grace_s = stop, grace_s
        self.stopped = False  # before the run's end
        self.saved_step = 0  # of the newest checkpoint
        self.begins_step = False
        self.asked_at = time.monotonic()
        self.longest_s = 0.0  # between two places where it asks

    def asked(self) -> bool:
        """Whether some rank was asked to stop; all ranks call it together."""
        now = time.monotonic()
        self.longest_s, self.asked_at = max(self.longest_s, now - self.asked_at), now
        return self.stop.asked_anywhere()

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved_step, self.asked_at = state.global_step, time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        self.stop.begin()
        self.begins_step = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
        if self.longest_s > self.grace_s:
            logger.warning(
                "asked to stop, this run may take %.0f s to do so, and stop_grace_s is %.0f: let the signal come "
                "earlier (Slurm: --signal=TERM@%.0f), or make steps and their parts smaller",
                *(self.longest_s, self.grace_s, 2 * self.longest_s),
            )
            self.grace_s = self.longest_s  # said once for each length

    def on_evaluate(self, args, state, control, **kwargs):
        self.asked_at = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        self.saved_step, self.asked_at = state.global_step, time.monotonic()
        if self.stopped:  # as saved the state knows its best, which a run that is to go on must not be put back to
            state.best_model_checkpoint = None


class GivesUpSteps(AtomicCheckpoints):
    """Mixed into TRL's trainers: `leave_if_asked` is called where a step may be left.

    `together` is set by the job; without it nothing stops a step.
    """

    together: StopTogether | None = None
    gives_up_steps = True
    COUNTED: tuple[str, ...] = ("current_flos",)  # attributes that a step moves, and that a checkpoint keeps
    _before: dict[str, Any]

    def leave_if_asked(self) -> None:
        """Give up the step that all ranks are in, if one of them was asked to stop.

        Raises:
            StepGivenUp: one was.
        """
        if self.together is not None and self.gives_up_steps and self.together.asked():
            raise StepGivenUp

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Extended by the place before each micro-batch.
        if self.together is not None and self.together.begins_step:
            self.together.begins_step = False
            self._before = self._counters()
        self.leave_if_asked()
        return super().training_step(model, inputs, num_items_in_batch)

    def _run_epoch(self, *args, **kwargs) -> None:
        # Extended by what follows a step that was given up.
        try:
            super()._run_epoch(*args, **kwargs)
        except StepGivenUp:
            self._save_before_the_step(kwargs["trial"])

    def _save_before_the_step(self, trial) -> None:
        assert self.together is not None
        self.together.stopped = self.control.should_training_stop = True
        if self.state.global_step in (0, self.together.saved_step):
            return  # there is nothing to save, or it is saved
        self._set_counters(self._before)
        self._save_checkpoint(self.model_wrapped, trial)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _counters(self) -> dict[str, Any]:
        """What a step moves beside weights and gradients: counts, and the states of random generators."""
        counted = {name: getattr(self, name) for name in self.COUNTED if hasattr(self, name)}
        return {"counted": counted, "tokens": self.state.num_input_tokens_seen, "random": random_state()}

    def _set_counters(self, before: dict[str, Any]) -> None:
        for name, value in before["counted"].items():
            setattr(self, name, value)
        self.state.num_input_tokens_seen = before["tokens"]
        set_random_state(before["random"])
