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

from rlt.durable import digest, read_json, write_whole
from rlt.errors import Refused
from rlt.jobs.child import run_child
from rlt.launching.lifetime import PREEMPTED
from rlt.planning.configuration import as_value, compose_config, quoted
from rlt.planning.plan import Plan
from rlt.planning.resolve import resolve
from rlt.runs.folder import (
    ALL_TRACES,
    EVALUATION,
    HELD_OUT,
    PREPARED,
    REPORT,
    STAGES_READ,
    TRACES,
    TRACES_AS_LINES,
    is_complete,
    mark_complete,
    saved_configuration,
)
from rlt.runs.hidden import is_secret
from rlt.runs.trackers import as_override
from rlt.schema import profile_of
from rlt.survival.stop_signals import StopOnSignal

# Of a stage's folder, what another may read: weights and settings of a model, rows, and an evaluation.
MADE = (
    *("*.safetensors", "config.json", "adapter_config.json", "tokenizer.json"),
    *(HELD_OUT, TRACES, TRACES_AS_LINES, ALL_TRACES, EVALUATION, f"{PREPARED}/*"),
)

logger = logging.getLogger("rlt")


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
        overrides = [f"{key}={_override(value, folders)}" for key, value in (entry.get("set") or {}).items()]
        folders[entry["name"]] = f"{config['output_dir']}/{entry['name']}"
        shared = [f"output_dir={quoted(folders[entry['name']])}", f"seed={config['seed']}"]
        shared.append(as_override(config))
        shared += [f"restarts={config['restarts']}"] if config.get("restarts") else []
        stages.append(Stage(entry["name"], folders[entry["name"]], [entry["run"], *shared, *overrides]))
    return stages


def _override(value: Any, folders: dict[str, str]) -> str:
    filled = _filled(value, folders)
    return filled if isinstance(filled, str) and filled == value else as_value(filled)


def _filled(value: Any, folders: dict[str, str]) -> Any:
    """With the folders of earlier stages in the places that name them, at any depth."""
    if isinstance(value, dict):
        return {key: _filled(inner, folders) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, folders) for inner in value]
    return value.format(**folders) if isinstance(value, str) else value


def run(plan: Plan, stop: StopOnSignal) -> None:
    """Every stage that is not finished, each on all devices of the plan, then the report."""
    from rlt.reports.page import write_report

    settings, folder = plan.settings, Path(plan.settings.output_dir)
    checked = check(plan)
    stop.begin()
    stages = [stage for stage, _ in checked]
    note_what_is_there(folder, checked)
    for number, (stage, stage_config) in enumerate(checked):
        check_fresh(folder, stage, stages[:number])
        if is_complete(stage_config):
            logger.info("%s is complete", stage.name)
            continue
        note_read(folder, stage, stages[:number])
        command = command_of(stage_config, plan)
        shown = [argument for argument in stage.arguments if not is_secret(argument)]
        logger.info("%s: %s %s", stage.name, " ".join(command), " ".join(shown))
        run_child([*command, *stage.arguments])
        if stop.asked:
            sys.exit(PREEMPTED)
    names = [stage.name for stage, _ in checked]
    write_report([folder], folder / REPORT)
    mark_complete(folder, {"stages": names})
    sys.stdout.write(f"{settings.run_name}: {len(names)} stages, report in {folder / REPORT}\n")


def read_by(stage: Stage, earlier: list[Stage]) -> dict[str, dict[str, str]]:
    """What the earlier stages that a stage names have made, by their names: files and their sums, as they are now."""
    text = " ".join(stage.arguments)
    named = [other for other in earlier if re.search(rf"{re.escape(other.folder)}(?=['/\s]|$)", text)]
    return {other.name: _made_in(Path(other.folder)) for other in named}


def _made_in(folder: Path) -> dict[str, str]:
    found = sorted(path for pattern in MADE for path in folder.glob(pattern))
    return {str(path.relative_to(folder)): digest(path) for path in found}


def note_read(folder: Path, stage: Stage, earlier: list[Stage]) -> None:
    """Before a stage begins, and on the disk: whatever ends the pipeline, its next life knows what the stage read."""
    before = read_json(folder / STAGES_READ) or {}
    write_whole(folder / STAGES_READ, json.dumps({**before, stage.name: read_by(stage, earlier)}, indent=1))


def note_what_is_there(folder: Path, stages: list[tuple[Stage, dict[str, Any]]]) -> None:
    """Of stages that are complete and left no note: what they would read now, before any is made again."""
    noted, earlier = read_json(folder / STAGES_READ) or {}, []
    for stage, config in stages:
        if is_complete(config) and stage.name not in noted:
            note_read(folder, stage, earlier)
        earlier = [*earlier, stage]


def check_fresh(folder: Path, stage: Stage, earlier: list[Stage]) -> None:
    """That nothing that a stage has read was made again since the stage began, in this life of the pipeline or another.

    Raises:
        Refused: an earlier stage that it reads has made something else.
    """
    before = (read_json(folder / STAGES_READ) or {}).get(stage.name)
    if before is None or saved_configuration(Path(stage.folder)) is None:  # it has yet to begin
        return
    now = read_by(stage, earlier)
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed:
        raise Refused(
            f"stage {stage.name} has begun or is complete, and {changed[0]}, which it reads, was made again since: "
            f"delete {stage.folder} and start the pipeline again"
        )


def check(plan: Plan) -> list[tuple[Stage, dict[str, Any]]]:
    """Every stage with its configuration, before any starts.

    Raises:
        Refused: a stage cannot work, its folder holds another run, or an evaluation asks what another stage reads.
    """
    stages, anew = stages_of(plan.config), plan.config["overwrite_output_dir"]
    checked = [(stage, configuration_of(stage, stages, plan.devices, plan.sharding, anew)) for stage in stages]
    check_evaluations(checked, anew)
    return checked


def command_of(config: dict[str, Any], plan: Plan) -> list[str]:
    """What starts a stage of a pipeline's plan, but for its arguments: as the pipeline was started itself."""
    if plan.sharding is None or profile_of(config).prepares:
        return ["train.py"]
    return ["launch.py", str(plan.devices), *_sharding_word(config, plan.sharding)]


def _sharding_word(config: dict[str, Any], sharding: str | None) -> list[str]:
    """Only what trains is sharded."""
    return [] if sharding is None or not profile_of(config).trains else [sharding]


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
    config = {**config, "overwrite_output_dir": anew}
    (word,) = _sharding_word(config, sharding) or ["ddp"]
    try:
        plan = resolve(config, given, devices, word, list_missing=True).plan
    except Refused as error:
        raise Refused(f"stage {stage.name}: {error}") from None
    to_come = [s.folder for s in stages]
    for line in plan.missing:  # what names an earlier stage's folder will be there; of its own, all has to be right now
        if line.startswith("output_dir=") or not any(folder in line for folder in to_come):
            raise Refused(f"stage {stage.name}: {line}")
    return {**plan.config, "overwrite_output_dir": False}


def problems(plan: Plan) -> list[str]:
    """What would stop each stage, for a dry run."""
    stages, found = stages_of(plan.config), []
    for stage in stages:
        try:
            configuration_of(stage, stages, plan.devices, plan.sharding, plan.config["overwrite_output_dir"])
        except Refused as error:
            found.append(str(error))
    return found


def reads(config: dict[str, Any]) -> bool:
    """Whether a stage learns, or makes, something of its rows: such rows may not be asked later."""
    profile = profile_of(config)
    return not (profile.asks or profile.stages or profile.prepares)


def check_evaluations(stages: list[tuple[Stage, dict[str, Any]]], anew: bool = False) -> None:
    """That no evaluation to come asks what another stage reads, or in another way than the one that it is compared
    with, before others have spent their hours.

    Args:
        anew: finished ones are to come again.

    Raises:
        Refused: how many questions are read, and the first; or what differs.
    """
    from rlt.jobs.evaluate import check_apart, check_same_way
    from rlt.runs.learned import rows_of

    to_come = tuple(stage.folder for stage, _ in stages)
    by_folder = {stage.folder: config for stage, config in stages}
    others = [config for _, config in stages if reads(config)]
    learned = [config for config in others if not config["dataset_id_or_path"].startswith(to_come)]
    for stage, config in stages:
        if not profile_of(config).asks or (is_complete(config) and not anew):
            continue
        try:
            check_same_way(config, by_folder.get(config["compare_with"], {}))
            if not config["dataset_id_or_path"].startswith(to_come):  # which has yet to be made
                check_apart(config, rows_of(config).rows, learned)
        except Refused as error:
            raise Refused(f"stage {stage.name}: {error}") from None
