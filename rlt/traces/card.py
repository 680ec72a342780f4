"""The data card of a folder of traces: where they come from, how many are kept, why others are out, how they score."""

from pathlib import Path
from typing import Any

import numpy as np

from rlt.data.sources import Rows
from rlt.durable import write_whole
from rlt.traces.selection import Selection

RANKED_BY = {
    "reward": "how well `{}` then understands the solution (arXiv 2506.08388)",
    "likelihood": "their likelihood under `{}`",
    "rsr": "their rank-surprisal ratio under `{}`, the lowest first (arXiv 2601.14249)",
    "random": "chance",
}
SHOWN = ("reward", "solution_log_prob_reward", "kl_reward", "tokens", "student_tokens")


def write_card(path: Path, config: dict[str, Any], asked: Rows, selection: Selection) -> None:
    write_whole(path, card(config, asked, selection))


def card(config: dict[str, Any], asked: Rows, selection: Selection) -> str:
    """Markdown.

    Args:
        asked: a row for each question that the teacher was asked, and how many other rows the source had, by reason.
    """
    lines = [
        f"# {config['run_name']}",
        "",
        f"Explanations of `{config['model_name_or_path']}` for questions of `{config['dataset_id_or_path']}`, "
        f"{config['traces_per_question']} a question at temperature {config['temperature']}, ranked by "
        f"{RANKED_BY[config['select']].format(config['student_model'])}.",
        "",
        "| | rows |",
        "|---|---|",
        f"| rows read | {len(asked.rows) + sum(asked.dropped.values())} |",
        *(f"| left out: {reason} | {count} |" for reason, count in asked.dropped.items()),
        f"| questions asked | {len(asked.rows)} |",
        f"| different ones of them | {selection.questions} |",
        f"| completions scored | {selection.scored} |",
        f"| share of them in the format | {selection.format_rate:.1%} |",
        *(f"| out: {reason} | {count} |" for reason, count in selection.dropped.items()),
        f"| kept | {len(selection.kept)} |",
        "",
        "| kept traces | mean | lowest | median | highest |",
        "|---|---|---|---|---|",
    ]
    for name in SHOWN:
        values = np.array([row[name] for row in selection.kept], dtype=float)
        figures = (values.mean(), values.min(), np.median(values), values.max())
        lines.append(f"| {name} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |")
    return "\n".join([*lines, "", f"Format `{config['reasoning_format']}`, seed {config['seed']}.", ""])
