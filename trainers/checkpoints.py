"""Checkpoints that are complete or absent, and that hold all a run needs to go on bit for bit.

Mixed into TRL's trainers. Beside what `Trainer` saves (weights, scheduler, random generators, state) a checkpoint holds
the optimizer's state in a form that any sharding reads; one of GRPO the buffered generations, the micro-step, and the
reference model where it moves.
"""

import os
import shutil
import signal
from pathlib import Path

import torch
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import rotate_checkpoints

from trainers.sharding import load_training_state, training_state

SAVING = ".saving"  # a checkpoint is written below it, then renamed
TRAINING_STATE = "training_state.pt"
KILL_VARIABLE = "RLT_KILL_AT"  # "saving:2" kills the process when that point is reached for the second time

_reached: dict[str, int] = {}


def kill_point(name: str) -> None:
    """A marked place where a test may end the process, as a power cut would."""
    wanted, _, times = os.environ.get(KILL_VARIABLE, "").partition(":")
    if wanted == name:
        _reached[name] = _reached.get(name, 0) + 1
        if _reached[name] == int(times or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return max(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)


class AtomicCheckpoints:
    """Overrides `Trainer._save_checkpoint`, which writes into place and can be cut off half-way."""

    _writing_aside = False

    def _get_output_dir(self, trial) -> str:
        base = super()._get_output_dir(trial)
        return os.path.join(base, SAVING) if self._writing_aside else base

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL would write a card at every checkpoint; the run's own files say more."""

    def _save_checkpoint(self, model, trial) -> None:
        output_dir = Path(self.args.output_dir)
        aside = output_dir / SAVING
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writing_aside = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing_aside = False
        name = f"checkpoint-{self.state.global_step}"
        self._save_extra_state(aside / name)
        kill_point("saving")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(output_dir / name, ignore_errors=True)  # the same step, saved by an earlier life of the run
            os.rename(aside / name, output_dir / name)
            shutil.rmtree(aside, ignore_errors=True)
            rotate_checkpoints(str(output_dir), save_total_limit=self.args.save_total_limit)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Overridden because `Trainer` writes them in the form of a sharding, and reads no other.
        state = training_state(self.model_wrapped, self.optimizer)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, TRAINING_STATE))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # Overridden for the same reason: what is wrapped and sharded by now is loaded from the one form that is kept.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        return prepared

    def _restore(self, folder: Path) -> None:
        state = torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True, mmap=True)
        load_training_state(self.model_wrapped, self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self._load_extra_state(folder)

    def _save_extra_state(self, folder: Path) -> None:
        """For subclasses: more files of a checkpoint."""

    def _load_extra_state(self, folder: Path) -> None:
        """For subclasses: the same files, read back."""
