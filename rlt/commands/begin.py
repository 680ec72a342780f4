"""The one beginning of every run: what a dry run prints, what is complete, what goes first, who holds the folder."""

import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext

import yaml

from rlt.commands.logs import set_up_logging
from rlt.jobs import pipeline, prepare
from rlt.places import ROOT
from rlt.planning.plan import Plan
from rlt.planning.resolve import Resolved
from rlt.planning.versions import check_versions, requirements_file
from rlt.runs.dashboard import prepare_dashboards
from rlt.runs.folder import folder_lock, is_complete, prepare_output
from rlt.runs.hidden import hide_secrets

logger = logging.getLogger("rlt")


def begin(
    resolved: Resolved, warm_up: Callable[[list[str]], int], start: Callable[[Plan], int], holds_folder: bool = True
) -> int:
    """Begin a run, once its command line is a plan.

    Args:
        warm_up: runs a warm-up's arguments first; its exit code.
        start: runs the plan; its exit code.
        holds_folder: whether this machine writes the output folder's configuration (of several, the first).

    Returns:
        The exit code.

    Raises:
        Refused: another run holds the output folder, or a pipeline's stage cannot work.
    """
    plan, config = resolved.plan, resolved.plan.config
    if config["dry_run"]:
        show(plan)
        return 0
    if plan.profile.prepares and plan.settings.stage is not None:
        prepare.show(plan)
        return 0
    if is_complete(config):
        sys.stdout.write(f"{config['output_dir']} is complete; overwrite_output_dir=true starts again\n")
        return 0
    if resolved.warmup is not None:
        logger.info("warm-up first: %s", " ".join(resolved.warmup))
        if code := warm_up(resolved.warmup):
            return code
    if plan.profile.stages:
        pipeline.check(plan)
    with folder_lock(config["output_dir"]) if holds_folder else nullcontext():
        if holds_folder:
            prepare_output(config)
            prepare_dashboards(config)
        return start(plan)


def show(plan: Plan) -> None:
    """What a dry run prints."""
    sys.stdout.write(f"{yaml.safe_dump(hide_secrets(plan.config), sort_keys=True)}\n{plan.report()}\n")
    missing = list(plan.missing)
    if plan.warms_up_first:
        name = plan.config["warmup_run"]
        what = f"rows {plan.config['dataset_id_or_path']}" if plan.profile.learns_from == "text" else None
        missing.append(f"{what or 'model ' + str(plan.config['model_name_or_path'])}: warm-up {name} would run first")
    if plan.profile.stages:
        missing += pipeline.problems(plan)
    sys.stdout.writelines(f"warning, missing: {line}\n" for line in missing)


def prepare_process() -> None:
    """What every process of a run does first: logging, the working folder, a look at the installed versions."""
    set_up_logging()
    os.chdir(ROOT)
    # Read by torch at its first allocation: a large buffer on the CPU then costs a few page faults, not hundreds.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for line in check_versions(requirements_file()):
        logger.warning("%s", line)
