"""Curves of one or several runs' logs, as one picture."""

import json
import math
from pathlib import Path

PANELS = (  # of a run's logs
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
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def draw_curves(folders: list[Path], path: Path) -> bool:
    """Every panel that some run has figures for, the runs side by side in it; False and no file where none has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = {str(folder): records for folder in folders if (records := records_of(folder))}
    lines = {label: {name: points(records, key) for name, records in logs.items()} for key, label in PANELS}
    drawn = {label: of_runs for label, of_runs in lines.items() if any(of_runs.values())}
    if not drawn:
        return False
    rows = math.ceil(len(drawn) / 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(12, 2.7 * rows), constrained_layout=True, squeeze=False)
    colors = dict(zip(logs, COLORS * len(logs), strict=False))
    for axis, (label, of_runs) in zip(axes.flat, drawn.items(), strict=False):
        for name, steps in of_runs.items():
            if steps:
                marker = "." if len(steps) < 3 else ""
                axis.plot(*zip(*steps, strict=True), color=colors[name], label=Path(name).name, marker=marker)
        axis.set_title(label, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        if len(logs) > 1:
            axis.legend(frameon=False, fontsize=7)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def points(records: list[dict], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]
