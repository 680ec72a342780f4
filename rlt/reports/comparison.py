"""Several runs side by side: the figures of evaluations, and the keys in which runs of one trainer differ."""

import html
from pathlib import Path

from rlt.estimates import Estimate
from rlt.reports.tables import evaluation_of, table
from rlt.runs.folder import run_in

PLACES = ("output_dir", "run_name")  # differ by themselves


def comparison(runs: dict[str, Path]) -> str:
    """Tables with a column for each run; empty where there is nothing to set beside another.

    Args:
        runs: folders by what the page calls them.
    """
    by_trainer: dict[str, dict[str, dict]] = {}
    for label, folder in runs.items():
        settings = run_in(folder)
        by_trainer.setdefault(settings["trainer"], {})[label] = settings
    tables = [figures(runs), *(differences(trainer, alike) for trainer, alike in by_trainer.items())]
    return "".join(tables)


def figures(runs: dict[str, Path]) -> str:
    found = {label: result for label, folder in runs.items() if (result := evaluation_of(folder))}
    if len(found) < 2:
        return ""
    names = dict.fromkeys(name for result in found.values() for name in result["figures"])
    rows = [
        (name, *(Estimate(**r["figures"][name]) if name in r["figures"] else "—" for r in found.values()))
        for name in names
    ]
    if any("difference" in result for result in found.values()):
        rows.append(("difference, paired", *(against(result, runs[label]) for label, result in found.items())))
    return f"<h2>Evaluations</h2>{table(('', *found), rows)}"


def against(result: dict, folder: Path) -> str:
    """An evaluation's difference from the one that its run was compared with."""
    if "difference" not in result:
        return "—"
    return f"{Estimate(**result['difference']).signed} against {run_in(folder)['compare_with']}"


def differences(trainer: str, runs: dict[str, dict]) -> str:
    """The keys in which runs of a trainer differ, by run."""
    names = sorted({name for settings in runs.values() for name in settings} - set(PLACES))
    values = [(name, *(repr(settings.get(name, "—")) for settings in runs.values())) for name in names]
    rows = [row for row in values if len(set(row[1:])) > 1]
    if not rows:
        return ""
    title = f"{len(rows)} keys in which the {len(runs)} {trainer} runs differ"
    return f"<details><summary>{html.escape(title)}</summary>{table(('key', *runs), rows)}</details>"
