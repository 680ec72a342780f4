"""The data card: what was read, what each stage kept and dropped and why, licences, and a picture of the funnel."""

from pathlib import Path

from rlt.preparation.inputs import parse_sources
from rlt.preparation.report import report
from rlt.preparation.run import StageResult
from rlt.runs.durable import write_whole, written_whole
from rlt.runs.folder import CARD, FUNNEL
from rlt.schema import PrepareSettings


def write_card(settings: PrepareSettings, results: list[StageResult]) -> None:
    """DATA_CARD.md and funnel.png in the output folder."""
    output = Path(settings.output_dir)
    draw_funnel(output / FUNNEL, results)
    sources = [
        f"| {s.name} | `{s.path}` | {s.format or 'by its columns'} | {s.license or 'unknown'} |"
        for s in parse_sources(settings.sources)
    ]
    lines = [
        f"# {settings.run_name}: prepared data",
        "",
        "| source | path | format | licence |",
        "|---|---|---|---|",
        *sources,
        "",
        f"![rows kept by each stage]({FUNNEL})",
        "",
        "```",
        report(results),
        "```",
    ]
    write_whole(output / CARD, "\n".join(lines) + "\n")


def draw_funnel(path: Path, results: list[StageResult]) -> None:
    """Rows kept after each stage, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.4 * len(results) + 1), layout="constrained")
    axes = figure.subplots()
    names, kept = [r.name for r in results], [r.counts.kept for r in results]
    bars = axes.barh(names, kept)
    axes.bar_label(bars, labels=[f"{count:,}" for count in kept], padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("rows kept")
    axes.margins(x=0.15)
    with written_whole(path) as aside:
        figure.savefig(aside, format="png", dpi=120, metadata={"Software": None})
