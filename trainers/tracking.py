"""What a trainer's run tells its trackers beside its metrics: its settings, its question, axes, completions.

The metrics themselves go through the callbacks of transformers (`report_to`), under the names that those give them.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import rewrite_logs

from rlt.durable import write_whole
from rlt.runs.dashboard import PROJECT, run_question, run_title
from rlt.runs.folder import MLFLOW_RUN
from rlt.runs.hidden import hide_secrets
from rlt.runs.trackers import trackers_of

STEP = "train/global_step"  # as transformers logs it
# Of these a run's summary says more than its last value: where they started and the best that there was.
HELD_OUT = {"eval/reward": "first,last,max", "eval/answer_reward": "first,last,max", "eval_accuracy": "first,last,max"}
HELD_OUT |= {"eval_loss": "first,last,min", "eval/length": "first,last"}
HELD_OUT |= {"eval/accuracy": "first,last,max"}
# The paired difference from the start, and its 95 % interval: a summary has the last.
HELD_OUT |= {f"eval/{name}_difference{end}": "last" for name in ("reward", "accuracy") for end in ("", "_low", "_high")}


TRACKER_CALLBACKS = (WandbCallback, TrackioCallback, TensorBoardCallback, MLflowCallback)


def tracker_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What the trackers' callbacks read of a trainer's arguments."""
    return {
        "report_to": trackers_of(config) or "none",
        "run_name": run_title(config),
        "project": config.get("project") or PROJECT,
    }


def tracker_name(key: str) -> str:
    """What transformers makes of a metric's name: `eval_loss` is `eval/loss`, and all but evaluations `train/`."""
    return next(iter(rewrite_logs({key: None})))


class QuietTrackio(TrackioCallback):
    """Extended because trackio prints where it logs to, and standard output is for a run's result."""

    def setup(self, *args, **kwargs):
        with contextlib.redirect_stdout(sys.stderr):
            super().setup(*args, **kwargs)

    def on_train_end(self, *args, **kwargs):
        with contextlib.redirect_stdout(sys.stderr):
            super().on_train_end(*args, **kwargs)


class TrackedRun(TrainerCallback):
    """Describes a run to its trackers, once their own callbacks have begun it; the main process alone does.

    Args:
        board: TensorBoard's callback, which alone knows the file that is written; None without it.
    """

    def __init__(self, config: dict[str, Any], board: TensorBoardCallback | None):
        self.config = config
        self.trackers = trackers_of(config)
        self.board = board

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        settings = {**hide_secrets(self.config), "question": run_question(self.config)}
        if "wandb" in self.trackers:
            self._describe_to_wandb(settings)
        if "trackio" in self.trackers:
            import trackio

            trackio.config.update(settings)
        if self.board is not None and self.board.tb_writer is not None:
            self.board.tb_writer.add_text("question", settings["question"])
        if "mlflow" in self.trackers:
            import mlflow  # pyrefly: ignore[missing-import]  # an extra that a user installs

            write_whole(Path(args.output_dir) / MLFLOW_RUN, mlflow.active_run().info.run_id)

    def _describe_to_wandb(self, settings: dict[str, Any]) -> None:
        import wandb

        assert wandb.run is not None  # its callback has begun it
        wandb.run.config.update(settings, allow_val_change=True)
        for key, summary in HELD_OUT.items():
            wandb.run.define_metric(tracker_name(key), step_metric=STEP, step_sync=True, summary=summary)


def log_completions(report_to: list[str], table, step: int) -> None:
    """A step's completions with their rewards and parts, as a table in the trackers that have tables.

    Args:
        table: pandas, a row for each completion.
    """
    shown = table.drop(columns="token_scores", errors="ignore")  # JSON for the report
    if "wandb" in report_to:
        import wandb

        assert wandb.run is not None
        wandb.run.log({"completions": wandb.Table(dataframe=shown), STEP: step})
    if "trackio" in report_to:
        import trackio

        trackio.log({"completions": trackio.Table(dataframe=shown), STEP: step})


def track(trainer, config: dict[str, Any]) -> None:
    """Put the callbacks of this module into a trainer: right behind those of the trackers, before any that logs."""
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [QuietTrackio() if type(found) is TrackioCallback else found for found in callbacks]
    trackers = [place for place, found in enumerate(callbacks) if isinstance(found, TRACKER_CALLBACKS)]
    if trackers:
        board = next((found for found in callbacks if isinstance(found, TensorBoardCallback)), None)
        callbacks.insert(trackers[-1] + 1, TrackedRun(config, board))
