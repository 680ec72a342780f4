"""A W&B workspace with the panels of a report: the same figures by the same names, over the steps of all runs."""

import math
from collections.abc import Callable

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

from rlt.reports.curves import PANELS

NAME = "Runs as report.py draws them"
STEP = "train/global_step"
GAIN = tuple(f"eval/reward_difference{end}" for end in ("", "_low", "_high"))
FUNCTIONS = r"train/rewards/.*/mean"  # of each of several reward functions


def workspace(entity: str, project: str, tracker_name: Callable[[str], str]) -> workspaces.Workspace:
    """Two open sections of curves, held-out questions first, and the last completions of each run.

    Args:
        entity: a user or a team.
        tracker_name: what the tracker calls a metric of `metrics.jsonl`.
    """
    held_out = [(key, label) for key, label in PANELS if key.startswith("eval")]
    training = [(key, label) for key, label in PANELS if not key.startswith("eval")]
    gain = reports.LinePlot(
        title="held-out reward against the start, 95 % interval", x=STEP, y=[tracker_name(key) for key in GAIN]
    )
    functions = reports.LinePlot(title="each reward function", x=STEP, metric_regex=FUNCTIONS)
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            _section("Held out", [gain, *(_panel(*one, tracker_name) for one in held_out)]),
            _section("Training", [*(_panel(*one, tracker_name) for one in training), functions]),
            _section("Completions", [reports.WeavePanelSummaryTable(table_name="completions")]),
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
    )


def _section(name: str, panels: list) -> workspaces.Section:
    layout = workspaces.SectionLayoutSettings(columns=3, rows=math.ceil(len(panels) / 3))  # all on one page
    return workspaces.Section(name=name, panels=panels, is_open=True, layout_settings=layout)


def _panel(key: str, label: str, tracker_name: Callable[[str], str]) -> reports.LinePlot:
    return reports.LinePlot(title=label, x=STEP, y=[tracker_name(key)])
