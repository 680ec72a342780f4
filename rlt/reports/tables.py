"""What a page says of a run in tables: its configuration, and the figures and answers of an evaluation."""

import html
from pathlib import Path

import yaml

from rlt.durable import read_json
from rlt.estimates import Estimate
from rlt.planning.configuration import compose_config, options
from rlt.reports.frames import frame_of
from rlt.runs.folder import ANSWERS, EVALUATION, run_in


def evaluation_of(folder: Path) -> dict | None:
    return read_json(folder / EVALUATION)


def evaluation(folder: Path) -> str:
    """Figures with their intervals, and the first right and the first wrong answer."""
    result = evaluation_of(folder)
    if result is None:
        return ""
    rows: list[tuple] = [(name, Estimate(**value)) for name, value in result["figures"].items()]
    if "difference" in result:
        rows.append(("difference, paired", Estimate(**result["difference"]).signed))
    count = html.escape(str(result["questions"]))
    return f"<p>{count} questions</p>{table(('', 'mean [95 % interval]'), rows)}{answers(folder)}"


def answers(folder: Path) -> str:
    frame = frame_of(folder / ANSWERS)
    if frame is None:
        return ""
    parts = []
    for name, chosen in (("right", frame["right"] > 0), ("wrong", frame["right"] <= 0)):
        if chosen.any():
            row = frame[chosen].iloc[0]
            asked, solution = (html.escape(row[column]) for column in ("question", "solution"))
            parts.append(f"<h3>{name}</h3><p class=n>{asked} ({solution})</p><pre>{html.escape(row['text'])}</pre>")
    return f"<details><summary>the first answers</summary>{''.join(parts)}</details>"


def configuration(folder: Path) -> str:
    """All of it, and first where it differs from its run file; a run of no file is compared with the default run."""
    config = run_in(folder)
    name = config.get("run_name")
    default, _ = compose_config([name] if name in options("run_cfg") else [])
    changed = [(k, repr(default.get(k, "—")), repr(v)) for k, v in sorted(config.items()) if default.get(k, "—") != v]
    compared = default["run_name"]
    differences = table(("key", compared, "here"), changed)
    everything = html.escape(yaml.safe_dump(config, sort_keys=True))
    return (
        f"<details><summary>{len(changed)} differences from {html.escape(compared)}</summary>{differences}</details>"
        f"<details><summary>configuration</summary><pre>{everything}</pre></details>"
    )


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
