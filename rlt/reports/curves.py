"""Curves of one or several runs' logs, as one picture.

Of a single run a panel has the training batch in grey and the held-out questions, on which progress is measured, over
it; of several, a panel has a line for each run, and held-out questions have panels of their own.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlt.durable import read_json_lines, written_whole
from rlt.runs.folder import METRICS

PANELS = (  # of a run's logs; after them one for each of several reward functions
    ("reward", "reward"),
    ("reward_parts/solution_log_prob_reward", "solution part"),
    ("reward_parts/kl_reward", "KL part"),
    ("reward_parts/format_rate", "format rate"),
    ("kl", "KL to the reference"),
    ("divergence", "divergence from the teacher (nats)"),
    ("completions/mean_length", "tokens per completion"),
    ("entropy", "entropy"),
    ("clip_ratio/region_mean", "clipped share"),
    ("sampling/sampling_logp_difference/mean", "mismatch with the engine (nats)"),
    ("generation/seconds", "seconds of generation"),
    ("scoring/seconds", "seconds of scoring"),
    ("update/seconds", "seconds of the update"),
    ("step_time", "seconds of a step"),
    ("loss", "loss"),
    ("eval_loss", "loss on held-out rows"),
    ("eval/reward", "reward on held-out questions"),
    ("eval/answer_reward", "accuracy on held-out questions"),
    ("eval/accuracy", "accuracy on held-out questions, distillation"),
    ("eval_accuracy", "accuracy on held-out questions, students"),
    ("eval_format_rate", "format rate on held-out questions, students"),
)
# What held-out questions have for what a training batch has.
OVER = {
    "reward": "eval/reward",
    "reward_parts/solution_log_prob_reward": "eval/solution_log_prob_reward",
    "reward_parts/kl_reward": "eval/kl_reward",
    "reward_parts/format_rate": "eval/format_rate",
    "completions/mean_length": "eval/length",
    "rewards/answer_reward/mean": "eval/answer_reward",
    "loss": "eval_loss",
}
COLUMNS = 3
COLORS = ("#1f6f8b", "#c8553d", "#6a994e", "#8e6c8a", "#e09f3e", "#335c67")
TRAINING = {"color": "#999999", "linewidth": 1.2}
HELD_OUT = {"color": COLORS[0], "linewidth": 2, "marker": "o", "markersize": 4}
ALONE = {"color": COLORS[0]}  # where nothing stands over it


class Line(NamedTuple):
    """One curve of a panel: `steps` are pairs of a step and its value, `look` is matplotlib's."""

    name: str
    steps: list[tuple[int, float]]
    look: dict[str, Any]


def records_of(folder: Path) -> list[dict]:
    return read_json_lines(folder / METRICS)


def draw_curves(runs: dict[str, Path], path: Path) -> bool:
    """The picture of `curves` as a file; False and no file where there is none."""
    with rc_context({"text.parse_math": False}):  # a folder's name may have dollar signs
        figure = curves(runs)
        if figure is not None:
            with written_whole(path) as aside:
                figure.savefig(aside, dpi=110, format="png")
    return figure is not None


def panels_of(logs: dict[str, list[dict]]) -> tuple[tuple[str, str], ...]:
    """Keys of the logs and what they are called."""
    keys = sorted({key for records in logs.values() for record in records for key in record})
    functions = [key for key in keys if key.startswith("rewards/") and not key.endswith("/std")]
    named = [(key, key.removeprefix("rewards/").removesuffix("/mean").replace("_", " ")) for key in functions]
    return (*PANELS, *named) if len(named) > 1 else PANELS  # of a single one, `reward` is the same


def curves(runs: dict[str, Path]) -> Figure | None:
    """Every panel that some run has figures for; None where none has.

    Args:
        runs: folders by what the legend calls them.
    """
    logs = {name: records for name, folder in runs.items() if (records := records_of(folder))}
    if len(logs) == 1:
        (records,) = logs.values()
        panels = panels_of_one(records, panels_of(logs))
    else:
        panels = panels_of_several(logs, panels_of(logs))
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4 * columns, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (label, lines) in zip(axes.flat, panels.items(), strict=False):
        draw_panel(axis, label, lines)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    return figure


def panels_of_several(logs: dict[str, list[dict]], named) -> dict[str, list[Line]]:
    """A line for each run that has the figure."""
    colors = dict(zip(logs, COLORS * len(logs), strict=False))
    found = {
        label: [
            Line(name, steps, {"color": colors[name]})
            for name, records in logs.items()
            if (steps := points(records, key))
        ]
        for key, label in named
    }
    return {label: lines for label, lines in found.items() if lines}


def panels_of_one(records: list[dict], named) -> dict[str, list[Line]]:
    """The training batch, and over it the held-out questions where the run has them."""
    known = {key: steps for key, _ in named if (steps := points(records, key))}
    over = {key: steps for key in known if key in OVER and (steps := points(records, OVER[key]))}
    found = {}
    for key, label in named:
        if key not in known or key in (OVER[below] for below in over):
            continue
        training = Line("training batch", known[key], TRAINING if key in over else ALONE)
        found[label] = [training, Line("held-out questions", over[key], HELD_OUT)] if key in over else [training]
    return found


def draw_panel(axis, label: str, lines: list[Line]) -> None:
    for line in lines:
        marker = {"marker": "."} if len(line.steps) < 3 else {}
        axis.plot(*zip(*line.steps, strict=True), label=line.name, **{**marker, **line.look})
    axis.set_title(label, fontsize=10)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.set_xlabel("step", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:  # by its lines: of itself a legend leaves out names that begin with an underscore
        axis.legend(handles=axis.get_lines(), frameon=False, fontsize=7)


def points(records: list[dict], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]
