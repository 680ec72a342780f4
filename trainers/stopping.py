"""All ranks stop after the same step, with a checkpoint, whichever of them was asked."""

from transformers import TrainerCallback

from rlt.survival.stop_signals import StopOnSignal


class StopTogether(TrainerCallback):
    """Asks a `StopOnSignal` at the end of each step."""

    def __init__(self, stop: StopOnSignal):
        self.stop = stop
        self.stopped = False  # before the run's end, with a checkpoint

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop.asked_anywhere() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if self.stopped:  # as saved the state knows its best, which a run that is to go on must not be put back to
            state.best_model_checkpoint = None
