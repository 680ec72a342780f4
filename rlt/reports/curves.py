"""Curves of one or several runs' logs, as one picture."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from rlt.runs.folder import METRICS, read_json_lines

PANELS = (  # of a run's logs; after them one for each of several reward functions
    ("reward", "reward"),
    ("reward_parts/solution_log_prob_reward", "solution part"),
    ("reward_parts/kl_reward", "KL part"),
    ("reward_parts/format_rate", "format rate"),
    ("kl", "KL to the reference"),
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
    ("eval_accuracy", "accuracy on held-out questions, students"),
    ("eval_format_rate", "format rate on held-out questions, students"),
)
COLORS = ("#1f6f8b", "#c8553d", "#6a994e", "#8e6c8a", "#e09f3e", "#335c67")


def records_of(folder: Path) -> list[dict]:
    return read_json_lines(folder / METRICS)


def draw_curves(runs: dict[str, Path], path: Path) -> bool:
    """The picture of `curves` as a file; False and no file where there is none."""
    figure = curves(runs)
    if figure is not None:
        figure.savefig(path, dpi=110)
    return figure is not None


def panels_of(logs: dict[str, list[dict]]) -> tuple[tuple[str, str], ...]:
    """Keys of the logs and what they are called."""
    keys = sorted({key for records in logs.values() for record in records for key in record})
    functions = [key for key in keys if key.startswith("rewards/") and not key.endswith("/std")]
    named = [(key, key.removeprefix("rewards/").removesuffix("/mean").replace("_", " ")) for key in functions]
    return (*PANELS, *named) if len(named) > 1 else PANELS  # of a single one, `reward` is the same


def curves(runs: dict[str, Path]) -> Figure | None:
    """Every panel that some run has figures for, the runs side by side in it; None where none has.

    Args:
        runs: folders by what the legend calls them.
    """
    logs = {name: records for name, folder in runs.items() if (records := records_of(folder))}
    lines = {label: {name: points(records, key) for name, records in logs.items()} for key, label in panels_of(logs)}
    drawn = {label: of_runs for label, of_runs in lines.items() if any(of_runs.values())}
    if not drawn:
        return None
    rows = math.ceil(len(drawn) / 3)
    figure = Figure(figsize=(12, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False)
    colors = dict(zip(logs, COLORS * len(logs), strict=False))
    for axis, (label, of_runs) in zip(axes.flat, drawn.items(), strict=False):
        for name, steps in of_runs.items():
            if steps:
                marker = "." if len(steps) < 3 else ""
                axis.plot(*zip(*steps, strict=True), color=colors[name], label=name, marker=marker)
        axis.set_title(label, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        if len(logs) > 1:  # by its lines: of itself a legend leaves out names that begin with an underscore
            axis.legend(handles=axis.get_lines(), frameon=False, fontsize=7)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    return figure


def points(records: list[dict], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]
