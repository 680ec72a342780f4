"""Checkpoints that are complete or absent, and that hold all a run needs to go on bit for bit.

Mixed into TRL's trainers. Beside what `Trainer` saves (weights, scheduler, random generators, state) a checkpoint holds
the optimizer's state in a form that any sharding reads, and with fp16 the gradient scaler's; one of GRPO the buffered
generations, the micro-step, and the reference model where it moves.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from backends.state import load_full_weights, load_training_state, training_state
from rlt.durable import disk_errors, flush, read_json, rename
from rlt.runs.folder import BEFORE, SAVING
from rlt.runs.manifest import seal, sums
from rlt.survival.kill_points import kill_point

TRAINING_STATE = "training_state.pt"


if TYPE_CHECKING:  # a mixin of trainers
    from transformers import Trainer as Base
else:
    Base = object

logger = logging.getLogger("rlt")


def newest(resume_from: str | None, own: Path | None) -> Path | None:
    """The checkpoint to start from, unless the run has made one behind it since."""
    if resume_from is None or own is None:
        return own if resume_from is None else Path(resume_from)
    return max(Path(resume_from), own, key=_step_of)


def _step_of(folder: Path) -> int:
    state = read_json(folder / TRAINER_STATE_NAME)
    return state["global_step"] if state else -1


def written_by_ranks(folder: Path, rank: int) -> dict[str, dict]:
    """`sums` of what each rank wrote alone, once all have it on the disk; together with all ranks.

    Each looks after its own: of a file of another machine, a network file system may show rank 0 nothing, or a part.
    """
    mine = sorted(folder.glob(f"*[-_]{rank}.pt*"))
    for path in mine:
        flush(path)
    return {name: one for written in gather_object([sums(folder, mine)]) for name, one in written.items()}


class AtomicCheckpoints(Base):
    """Overrides `Trainer._save_checkpoint`, which writes into place and can be cut off half-way."""

    _writing_aside = False
    args: Any
    optimizer: Any
    lr_scheduler: Any

    def _get_output_dir(self, trial) -> str:
        base = super()._get_output_dir(trial)
        return os.path.join(base, SAVING) if self._writing_aside else base

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL would write a card at every checkpoint; ours (rlt/reports/model_card.py) comes with the model's push."""

    def _save_checkpoint(self, model, trial) -> None:
        output_dir = Path(self.args.output_dir)
        with disk_errors(output_dir):
            self._save_aside(output_dir, model, trial)

    def _save_aside(self, output_dir: Path, model, trial) -> None:
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
        if self.state.best_global_step == self.state.global_step:
            # Super has it below the folder that the checkpoint is about to leave.
            self.state.best_model_checkpoint = str(output_dir / name)
            if self.args.should_save:
                self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
        kill_point("saving")
        of_ranks = written_by_ranks(aside / name, self.accelerator.process_index)
        if self.args.should_save:
            seal(aside / name, of_ranks)
            if (output_dir / name).exists():  # the same step, saved by an earlier life of the run
                rename(output_dir / name, aside / BEFORE)
                kill_point("replacing")
            rename(aside / name, output_dir / name)
            shutil.rmtree(aside, ignore_errors=True)
            rotate_checkpoints(str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _run_epoch(self, *args, **kwargs) -> None:
        # Extended because a run whose last checkpoint is its end would take a step more before it is asked.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Overridden because `Trainer` writes them in the form of a sharding, and reads no other.
        state = training_state(self.model_wrapped, self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, TRAINING_STATE))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # Overridden for the same reason: what is wrapped and sharded by now is loaded from the one form that is kept.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        return prepared

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        # Extended because the best checkpoint is remembered by its path, and a run's folder may have moved since.
        started = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        kept = self.args.load_best_model_at_end and self.state.best_global_step
        if resume_from_checkpoint is not None and kept:
            best = Path(resume_from_checkpoint).parent / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)
            else:
                logger.warning("%s, the best checkpoint so far, is gone: the best of those to come is kept", best)
                self.state.best_model_checkpoint = self.state.best_metric = self.state.best_global_step = None
        return started

    def _load_best_model(self) -> None:
        # Overridden for the same reason.
        path = Path(str(self.state.best_model_checkpoint)) / TRAINING_STATE
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        load_full_weights(self.model_wrapped, state["weights"])

    def _restore(self, folder: Path) -> None:
        state = torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True, mmap=True)
        load_training_state(self.model_wrapped, self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.accelerator.scaler is not None:  # fp16
            self._load_scaler(str(folder))
        self._load_extra_state(folder)

    def _save_extra_state(self, folder: Path) -> None:
        """For subclasses: more files of a checkpoint."""

    def _load_extra_state(self, folder: Path) -> None:
        """For subclasses: the same files, read back."""
