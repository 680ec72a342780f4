"""`report_to`: the trackers that a run's figures go to, beside its own `metrics.jsonl`.

Imports no tracker: the plan asks it before a run.
"""

import importlib.util
from typing import Any

from rlt.errors import Refused

# By name, which is its package's too; the command that brings it.
TRACKERS = {
    "wandb": "./setup.sh",
    "trackio": "./setup.sh",
    "tensorboard": "./setup.sh",
    "mlflow": ".venv/bin/python -m pip install mlflow",  # 60 packages more, for what the others do as well
}


def trackers_of(config: dict[str, Any]) -> list[str]:
    """Their names; the key takes one, a list, or null, which is none."""
    named = config["report_to"]
    return [named] if isinstance(named, str) else list(named or [])


def as_override(config: dict[str, Any]) -> str:
    """`report_to` for the command line of a run that reports where this one does."""
    named = trackers_of(config)
    if not named:
        return "report_to=null"
    return f"report_to={named[0]}" if len(named) == 1 else f"report_to=[{','.join(named)}]"


def check_trackers(config: dict[str, Any]) -> None:
    """Refuse what is no tracker.

    Raises:
        Refused: it is unknown, or named twice.
    """
    named = trackers_of(config)
    for name in named:
        if name not in TRACKERS:
            raise Refused(f"report_to={name} is no tracker: use one or a list of {', '.join(TRACKERS)}, or null")
        if named.count(name) > 1:
            raise Refused(f"report_to={named} names {name} twice: name it once")


def check_packages(config: dict[str, Any]) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        Refused: with the command that brings it.
    """
    for name in trackers_of(config):
        if importlib.util.find_spec(name) is None:
            raise Refused(f"report_to={name}: the package {name} is not installed; {TRACKERS[name]} brings it")
