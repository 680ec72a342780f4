"""Checkpoints that are complete or absent, and that hold all a run needs to go on bit for bit.

Mixed into TRL's trainers. Beside what `Trainer` saves (weights, optimizer, scheduler, random generators, state) a
checkpoint of GRPO holds the buffered generations, the micro-step, and the reference model where it moves.
"""

import os
import shutil
import signal
from pathlib import Path

from transformers.trainer_utils import rotate_checkpoints

SAVING = ".saving"  # a checkpoint is written below it, then renamed
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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_extra_state(Path(checkpoint))

    def _save_extra_state(self, folder: Path) -> None:
        """For subclasses: more files of a checkpoint."""

    def _load_extra_state(self, folder: Path) -> None:
        """For subclasses: the same files, read back."""
