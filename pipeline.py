"""Several runs, one after the other: `./launch_mono.sh pipeline_tiny`.

A pipeline's run file lists its stages: a run, where it goes below the output folder, and overrides, in which `{name}`
stands for the folder of an earlier stage. A finished stage is skipped, an interrupted one continued, each in a process
of its own; the report of all of them comes last.
"""

import json
import logging
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launching import PREEMPTED
from plan import Plan, check_output, make_plan
from train import compose_config, is_complete

ROOT = Path(__file__).resolve().parent
MARKER = "COMPLETE"

logger = logging.getLogger("train")


@dataclass(frozen=True)
class Stage:
    """A run of a pipeline, ready to start."""

    name: str
    arguments: list[str]


def stages_of(config: dict[str, Any]) -> list[Stage]:
    """The stages with the folders of earlier ones filled in."""
    folders: dict[str, str] = {}
    stages = []
    for entry in config["stages"]:
        overrides = [f"{key}={str(value).format(**folders)}" for key, value in entry.get("set", {}).items()]
        folders[entry["name"]] = f"{config['output_dir']}/{entry['name']}"
        shared = [f"output_dir={folders[entry['name']]}", f"report_to={config['report_to'] or 'null'}"]
        stages.append(Stage(entry["name"], [entry["run"], *shared, *overrides]))
    return stages


def run(plan: Plan, command: tuple[str, ...] = ("train.py",)) -> None:
    """Every stage that is not finished, then the report.

    Args:
        command: what starts a stage, with its arguments behind.
    """
    from report import write_report

    config, folder = plan.config, Path(plan.config["output_dir"])
    stages = stages_of(config)
    found = [(stage, _configuration(stage)) for stage in stages]  # all of them, before any starts
    for stage, its_config in found:
        if is_complete(its_config):
            logger.info("%s is complete", stage.name)
            continue
        logger.info("%s: %s %s", stage.name, command[0], " ".join(stage.arguments))
        _run_one([*command, *stage.arguments])
    write_report([folder / stage.name for stage in stages], folder / "report.html")
    (folder / MARKER).write_text(json.dumps({"stages": [stage.name for stage in stages]}))
    sys.stdout.write(f"{config['run_name']}: {len(stages)} stages, report in {folder / 'report.html'}\n")


def _configuration(stage: Stage) -> dict[str, Any]:
    """Of a stage, checked but for what an earlier one has yet to make.

    Raises:
        ValueError: the stage cannot work, or its folder holds another run.
    """
    config, _ = compose_config(stage.arguments)
    check_output(make_plan({**config, "dry_run": True}))
    return config


def _run_one(arguments: list[str]) -> None:
    """A process that gets our signals; exits as it does, when it fails."""
    process = subprocess.Popen([sys.executable, str(ROOT / arguments[0]), *arguments[1:]])
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: process.send_signal(number)) for number in numbers]
    try:
        code = process.wait()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if code:
        if code != PREEMPTED:
            logger.error("exit code %d; the same command continues where it stopped", code)
        sys.exit(code if code > 0 else 128 - code)
