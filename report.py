"""One HTML page of one or several runs, with nothing from outside.

    python report.py OUTPUT_DIR... [--out=report.html]

Curves of rewards and their parts, KL, length, entropy, clipping, mismatch and seconds by phase; the best, median and
worst completions; evaluations; the configuration and where it differs from the default.
"""

import base64
import html
import io
import json
import math
import sys
from pathlib import Path

import yaml

USAGE = "usage: python report.py OUTPUT_DIR... [--out=report.html]"
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
    ("step_time", "seconds of a step"),
    ("loss", "loss"),
    ("eval_loss", "loss on held-out rows"),
)
COLORS = ("#1f6f8b", "#c8553d", "#6a994e", "#8e6c8a", "#e09f3e", "#335c67")
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h1,h2,h3{line-height:1.2}table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;"
    "vertical-align:top;border-bottom:1px solid #ddd}pre{white-space:pre-wrap;background:#f6f6f4;padding:.8rem}"
    "img{max-width:100%}details{margin:.6rem 0}.n{color:#777}"
)


def write_report(folders: list[Path], path: Path) -> None:
    """
    Raises:
        ValueError: a folder holds no run.
    """
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder} holds no run (no config.yaml)")
    name = ", ".join(folder.name for folder in folders)
    parts = [f"<h1>{html.escape(name)}</h1>", curves(folders)]
    for folder in folders:
        parts += [f"<h2>{html.escape(folder.name)}</h2>", *sections(folder)]
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(name)}</title><style>{STYLE}</style>{''.join(parts)}"
    )
    path.write_text(page, encoding="utf-8")


def sections(folder: Path) -> list[str]:
    """What a run left, as far as it is there."""
    found = [evaluation(folder), card(folder), completions(folder), configuration(folder)]
    return [section for section in found if section]


def records_of(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def curves(folders: list[Path]) -> str:
    """Every panel that some run has figures for, the runs side by side in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = {str(folder): records for folder in folders if (records := records_of(folder))}
    lines = {label: {name: points(records, key) for name, records in logs.items()} for key, label in PANELS}
    drawn = {label: of_runs for label, of_runs in lines.items() if any(of_runs.values())}
    if not drawn:
        return ""
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
    return image(figure)


def points(records: list[dict], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def image(figure) -> str:
    """A figure as part of the page."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    pyplot.close(figure)
    return f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def evaluation(folder: Path) -> str:
    path = folder / "evaluation.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text())
    rows = [(name, *(f"{v[k]:.3f}" for k in ("mean", "low", "high"))) for name, v in result["figures"].items()]
    if "difference" in result:
        v = result["difference"]
        rows.append(("difference, paired", *(f"{v[k]:+.3f}" for k in ("mean", "low", "high"))))
    return f"<p>{result['questions']} questions</p>{table(('', 'mean', 'low', 'high'), rows)}"


def card(folder: Path) -> str:
    path = folder / "DATA_CARD.md"
    return (
        f"<details open><summary>data card</summary><pre>{html.escape(path.read_text())}</pre></details>"
        if path.is_file()
        else ""
    )


def completions(folder: Path) -> str:
    """The best, the median and the worst of the last step, or of all traces."""
    import pandas

    steps = sorted((folder / "completions").glob("step-*.parquet")) or sorted((folder / "all").glob("traces.parquet"))
    if not steps:
        return ""
    frame = pandas.read_parquet(steps[-1])
    score = "reward" if "reward" in frame else next((c for c in frame if c.startswith("reward/")), None)
    if score is None or frame.empty:
        return ""
    frame = frame.sort_values(score, ascending=False, ignore_index=True)
    shown = []
    for name, place in (("best", 0), ("median", len(frame) // 2), ("worst", len(frame) - 1)):
        row = frame.iloc[place]
        numbers = {k: f"{v:.3f}" for k, v in row.items() if isinstance(v, float)}
        listed = ", ".join(f"{k} {v}" for k, v in numbers.items())
        shown.append(f"<h3>{name}</h3><p class=n>{html.escape(listed)}</p><pre>{html.escape(row['completion'])}</pre>")
    return f"<details><summary>completions of {steps[-1].stem}</summary>{''.join(shown)}</details>"


def configuration(folder: Path) -> str:
    """All of it, and first where it differs from the default run's."""
    from train import compose_config

    config = yaml.safe_load((folder / "config.yaml").read_text())
    default, _ = compose_config([])
    changed = [(k, repr(default.get(k, "—")), repr(v)) for k, v in sorted(config.items()) if default.get(k, "—") != v]
    differences = table(("key", "default", "here"), changed)
    everything = html.escape(yaml.safe_dump(config, sort_keys=True))
    return (
        f"<details><summary>{len(changed)} differences from the default run</summary>{differences}</details>"
        f"<details><summary>configuration</summary><pre>{everything}</pre></details>"
    )


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def main() -> None:
    from train import fail

    named = [word for word in sys.argv[1:] if not word.startswith("--out=")]
    out = next((word.removeprefix("--out=") for word in sys.argv[1:] if word.startswith("--out=")), "report.html")
    if not named or any(word.startswith("-") for word in named):
        sys.exit(f"error: {USAGE}")
    try:
        write_report([Path(name) for name in named], Path(out))
    except ValueError as error:
        fail(error)
    sys.stdout.write(f"{out}\n")


if __name__ == "__main__":
    main()
