"""Runs that train: as one process or as one rank of several, to the model that they leave."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import broadcast_object_list

from backends.roll_call import RollCall, is_one_of_several
from rlt.durable import disk_errors, flush
from rlt.errors import Refused
from rlt.launching.lifetime import PREEMPTED
from rlt.models.loading import quiet_libraries
from rlt.models.paths import MERGED, merged_model_path
from rlt.planning.plan import Plan
from rlt.reports.model_card import write_model_card
from rlt.runs.folder import mark_complete
from rlt.runs.hub import make_repository, push
from rlt.runs.manifest import damage_of, last_checkpoint
from rlt.schema import Training
from rlt.survival.kill_points import kill_point
from rlt.survival.standstill import EndStandstill
from rlt.survival.stop_signals import StopOnSignal
from trainers.build import build_trainer
from trainers.checkpoints import newest
from trainers.stopping import SaveByMinutes, StopTogether

logger = logging.getLogger("rlt")


def run(plan: Plan, stop: StopOnSignal) -> None:
    """Train, from the newest checkpoint where there is one; then save the model and say what came of it."""
    settings: Training = plan.settings
    quiet_libraries()
    trainer, evaluation = build_trainer(plan)
    repository = make_repository(plan.config) if trainer.is_world_process_zero() else None
    together = trainer.together = StopTogether(stop, settings.stop_grace_s)
    by_minutes = [SaveByMinutes(settings.save_minutes)] if settings.save_minutes else []
    standstill = EndStandstill(trainer.args.ddp_timeout)
    for callback in (together, standstill, *by_minutes, *([RollCall()] if is_one_of_several() else [])):
        trainer.add_callback(callback)
    checkpoint = agreed(lambda: starting_point(settings), trainer.is_world_process_zero())
    with standstill:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if together.stopped:
        if trainer.is_world_process_zero():
            step = trainer.state.global_step
            what = f"stopped after step {step} and saved" if step else "stopped before the first step's end"
            logger.warning("%s: the same command continues", what)
        sys.exit(PREEMPTED)
    finish(trainer, plan, repository)
    if not trainer.is_world_process_zero():
        return
    sentence = evaluation.sentence() if evaluation else None
    result = f"{settings.run_name}: {trainer.state.global_step} steps, model in {settings.output_dir}"
    sys.stdout.write(f"{result}\n{sentence}\n" if sentence else f"{result}\n")


def agreed(choose: Callable[[], Path | None], is_main: bool) -> Path | None:
    """What the main process chooses, on all ranks: those of other machines may not see the same files yet.

    Raises:
        Refused: on every rank, where it cannot choose.
    """
    answer: list[str | None] = [None, None]  # a path, or why there is none
    if is_main:
        try:
            answer[0] = str(choose() or "")
        except Refused as error:
            answer[1] = str(error)
    chosen, refusal = broadcast_object_list(answer)
    if refusal is not None:
        raise Refused(refusal)
    return Path(chosen) if chosen else None


def starting_point(settings: Training) -> Path | None:
    """The checkpoint that a run goes on from.

    Raises:
        Refused: `resume_from` names one that is damaged.
    """
    checkpoint = newest(settings.resume_from, last_checkpoint(settings.output_dir))
    if checkpoint is None:
        return None
    if damage := damage_of(checkpoint):
        raise Refused(f"resume_from={checkpoint} is damaged: {damage}")
    logger.info("resuming from %s", checkpoint)
    return checkpoint


def finish(trainer, plan: Plan, repository: str | None = None) -> None:
    """The final model and tokenizer, adapters merged on request, pushed on request, and the marker that says so.

    Args:
        repository: to push to, on the main process.

    Raises:
        Refused: the hub did not take the model; without the marker, the same command tries again.
    """
    settings: Training = plan.settings
    kill_point("finishing")
    folder = Path(settings.output_dir)
    with disk_errors(folder):
        trainer.save_model(str(folder))  # together with all ranks
    if not trainer.is_world_process_zero():
        return
    trainer.processing_class.save_pretrained(str(folder))
    if settings.save_merged_model and settings.use_peft:
        merged_model_path(folder, settings.trust_remote_code)
    if repository is not None:
        write_model_card(folder, trainer.state.best_global_step if trainer.args.load_best_model_at_end else None)
        logger.info("pushed to %s", push(plan.config, repository))
    for path in (*folder.iterdir(), *(folder / MERGED).glob("*")):  # what transformers and peft wrote
        if path.is_file():
            flush(path)
    mark_complete(folder, {"steps": trainer.state.global_step, "epochs": trainer.state.epoch})
