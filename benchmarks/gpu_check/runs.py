"""Training runs on random models, by the configuration, plan and trainers that `train.py` has."""

from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from benchmarks.gpu_check.measures import compilations, forget_peak, held_gib, now, peak_gib
from rlt.models.loading import quiet_libraries
from rlt.planning.configuration import compose_config
from rlt.planning.plan import Plan
from rlt.planning.resolve import resolve
from rlt.runs.folder import prepare_output
from trainers.build import build_trainer

EVERY_RUN = ["report_to=null", "eval_size=0", "save_steps=100", "dataset_size=null", "learning_rate=1e-4"]


class StepSeconds(TrainerCallback):
    """Of each optimizer step, and how often torch.compile had compiled at its end."""

    def __init__(self, device: str):
        self.device = device
        self.seconds: list[float] = []
        self.compilations: list[int] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = now(self.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(now(self.device) - self.start)
        self.compilations.append(compilations())


def plan_of(folder: Path, *overrides: str) -> Plan:
    return resolve(*compose_config([*EVERY_RUN, f"output_dir={folder}", *overrides])).plan


def trainer_of(plan: Plan, device: str) -> tuple:
    """The trainer, which leaves no checkpoint behind, and the seconds of its steps to come."""
    quiet_libraries()
    prepare_output(plan.config)
    trainer, _ = build_trainer(plan)
    trainer.args.save_strategy = "no"  # its last step would write one
    steps = StepSeconds(device)
    trainer.add_callback(steps)
    return trainer, steps


def train_and_measure(plan: Plan, device: str, look: Callable = lambda trainer: None) -> tuple:
    """Train a plan to its end.

    Args:
        look: at the trainer, before its first step.

    Returns:
        the trainer, and seconds by step, compilations, measured peak over what was held before, and the estimate's
        largest phase.
    """
    forget_peak(device)
    before = held_gib(device)
    trainer, steps = trainer_of(plan, device)
    look(trainer)
    trainer.train()
    measured, estimate = peak_gib(device) - before, max(plan.memory_gib.values())
    figures = {
        "step_seconds": steps.seconds,
        "compilations": steps.compilations,
        "peak_gib": measured,
        "estimate_gib": estimate,
        "estimate_by_peak": estimate / measured if measured else None,
    }
    return trainer, figures
