"""Several runs, one after the other: `./launch_mono.sh pipeline_tiny`.

A pipeline's run file lists its stages: a run, where it goes below the output folder, and overrides, in which `{name}`
stands for the folder of an earlier stage. A finished stage is skipped, an interrupted one continued, each in a process
of its own; the report of all of them comes last.
"""

import json
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checks import JOBS
from configuration import apply_memory_profile, apply_warmup, compose_config, quoted
from errors import Refused
from launching import run_child
from plan import MARKER, SECRET, Plan, is_complete, make_plan

logger = logging.getLogger("train")


@dataclass(frozen=True)
class Stage:
    """A run of a pipeline, ready to start."""

    name: str
    folder: str
    arguments: list[str]


def stages_of(config: dict[str, Any]) -> list[Stage]:
    """The stages with the folders of earlier ones filled in."""
    folders: dict[str, str] = {}
    stages = []
    for entry in config["stages"]:
        overrides = [f"{key}={_filled(value, folders)}" for key, value in (entry.get("set") or {}).items()]
        folders[entry["name"]] = f"{config['output_dir']}/{entry['name']}"
        shared = [f"output_dir={quoted(folders[entry['name']])}", f"seed={config['seed']}"]
        shared.append(f"report_to={config['report_to'] or 'null'}")
        stages.append(Stage(entry["name"], folders[entry["name"]], [entry["run"], *shared, *overrides]))
    return stages


def _filled(value: Any, folders: dict[str, str]) -> str:
    if value is None:
        return "null"
    filled = str(value).format(**folders)
    return filled if filled == str(value) else quoted(filled)


def run(plan: Plan, devices: int | None = None, sharding: str | None = None) -> None:
    """Every stage that is not finished, then the report.

    Args:
        devices: for each stage, by launch.py; None: one, by train.py.
        sharding: over them, of the stages that train.
    """
    from report import write_report

    config, folder = plan.config, Path(plan.config["output_dir"])
    found, made = check(plan, devices, sharding), []
    for stage, its_config in found:
        if is_complete(its_config):
            check_fresh(stage, made)
            logger.info("%s is complete", stage.name)
            continue
        made.append(stage)
        command = command_of(its_config, devices, sharding)
        shown = [argument for argument in stage.arguments if not argument.partition("=")[0].endswith(SECRET)]
        logger.info("%s: %s %s", stage.name, " ".join(command), " ".join(shown))
        run_child([*command, *stage.arguments])
    names = [stage.name for stage, _ in found]
    write_report([folder], folder / "report.html")
    (folder / MARKER).write_text(json.dumps({"stages": names}))
    sys.stdout.write(f"{config['run_name']}: {len(names)} stages, report in {folder / 'report.html'}\n")


def check_fresh(stage: Stage, made: list[Stage]) -> None:
    """That nothing that a finished stage read was made again since.

    Args:
        made: stages that ran in this life.

    Raises:
        Refused: one that it reads.
    """
    text = " ".join(stage.arguments)
    read = [other for other in made if re.search(rf"{re.escape(other.folder)}(?=['/\s]|$)", text)]
    if read:
        raise Refused(
            f"stage {stage.name} is complete, and {read[0].name}, which it reads, was made again: delete "
            f"{stage.folder} and start the pipeline again"
        )


def check(plan: Plan, devices: int | None = None, sharding: str | None = None) -> list[tuple[Stage, dict[str, Any]]]:
    """Every stage with its configuration, before any starts. Arguments as in `run`.

    Raises:
        Refused: a stage cannot work, its folder holds another run, or an evaluation asks what another stage reads.
    """
    stages, anew = stages_of(plan.config), plan.config["overwrite_output_dir"]
    found = [(stage, configuration_of(stage, stages, devices or 1, sharding, anew)) for stage in stages]
    check_evaluations(found, anew)
    return found


def command_of(config: dict[str, Any], devices: int | None, sharding: str | None) -> list[str]:
    """What starts a stage, but for its arguments."""
    return ["train.py"] if devices is None else ["launch.py", str(devices), *_sharding_word(config, sharding)]


def _sharding_word(config: dict[str, Any], sharding: str | None) -> list[str]:
    """Only what trains is sharded."""
    return [] if sharding is None or config["trainer"] in JOBS else [sharding]


def configuration_of(
    stage: Stage, stages: list[Stage], devices: int, sharding: str | None = None, anew: bool = False
) -> dict[str, Any]:
    """The configuration of a stage, checked but for what an earlier one has yet to make.

    Args:
        anew: what stands in its folder is deleted.

    Raises:
        Refused: the stage cannot work, or its folder holds another run.
    """
    config, given = compose_config(stage.arguments)
    word = _sharding_word(config, sharding) or ["ddp"]
    try:
        apply_memory_profile(config, given, devices, *word)
        warmup = apply_warmup(config, given, devices, *word)
        missing = make_plan(
            {**config, "dry_run": True, "overwrite_output_dir": anew}, devices, warmup is not None, *word
        ).missing
    except Refused as error:
        raise Refused(f"stage {stage.name}: {error}") from None
    to_come = [s.folder for s in stages]
    for line in missing:  # what names an earlier stage's folder will be there; of its own, all has to be right now
        if line.startswith("output_dir=") or not any(folder in line for folder in to_come):
            raise Refused(f"stage {stage.name}: {line}")
    return config


def problems(plan: Plan, sharding: str | None) -> list[str]:
    """What would stop each stage, for a dry run."""
    stages, found = stages_of(plan.config), []
    for stage in stages:
        try:
            configuration_of(stage, stages, plan.devices, sharding, plan.config["overwrite_output_dir"])
        except Refused as error:
            found.append(str(error))
    return found


def check_evaluations(stages: list[tuple[Stage, dict[str, Any]]], anew: bool = False) -> None:
    """That no evaluation to come asks what another stage reads, or in another way than the one that it is compared
    with, before others have spent their hours.

    Args:
        anew: finished ones are to come again.

    Raises:
        Refused: how many questions are read, and the first; or what differs.
    """
    from data.learned import rows_of
    from evaluate import check_apart, check_same_way

    to_come = tuple(stage.folder for stage, _ in stages)
    by_folder = {stage.folder: config for stage, config in stages}
    others = [config for _, config in stages if config["trainer"] not in ("evaluate", "pipeline")]
    learned = [config for config in others if not config["dataset_id_or_path"].startswith(to_come)]
    for stage, config in stages:
        if config["trainer"] != "evaluate" or (is_complete(config) and not anew):
            continue
        try:
            check_same_way(config, by_folder.get(config["compare_with"], {}))
            if not config["dataset_id_or_path"].startswith(to_come):  # which has yet to be made
                check_apart(config, rows_of(config).rows, learned)
        except Refused as error:
            raise Refused(f"stage {stage.name}: {error}") from None
