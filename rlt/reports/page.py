"""One HTML page of one or several runs, with nothing from outside, and its curves as a PNG beside it."""

import base64
import html
import os
from pathlib import Path

from rlt.durable import write_whole
from rlt.errors import Refused
from rlt.reports.comparison import comparison
from rlt.reports.completion_table import completion_table
from rlt.reports.completions import completions
from rlt.reports.curves import draw_curves
from rlt.reports.result import summary
from rlt.reports.safe import policy, readable
from rlt.reports.tables import configuration, evaluation
from rlt.runs.folder import CARD, run_in, saved_configuration
from rlt.schema import profile_of

HERE = Path(__file__).parent


def write_report(folders: list[Path], path: Path) -> None:
    """Write the page of some runs, and its picture beside it.

    Raises:
        Refused: a folder holds no run.
    """
    runs = labelled([run for folder in folders for run in runs_of(folder)])
    name = ", ".join(labelled(folders))
    parts = [f"<h1>{html.escape(name)}</h1>", summary(runs)]
    if draw_curves(runs, picture_of(path)):
        picture = base64.b64encode(picture_of(path).read_bytes()).decode()
        parts.append(f'<img alt="curves" src="data:image/png;base64,{picture}">')
    if len(runs) > 1:
        parts.append(comparison(runs))
    for label, folder in runs.items():
        parts += [f"<h2>{html.escape(label)}</h2>", *sections(folder)]
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "table.js"))
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy(script)}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)}</title><style>{style}</style>{''.join(parts)}<script>{script}</script></html>"
    )
    write_whole(path, readable(page))


def runs_of(folder: Path) -> list[Path]:
    """The folder itself; of a pipeline those of its stages that have begun, in its order.

    Raises:
        Refused: it holds no run, or a pipeline that has not begun.
    """
    config = run_in(folder)
    if not profile_of(config).stages:
        return [folder]
    stages = [folder / stage["name"] for stage in config["stages"]]
    begun = [stage for stage in stages if saved_configuration(stage)]
    if not begun:
        raise Refused(f"{folder} is a pipeline of which no stage has begun: start it again")
    return [run for stage in begun for run in runs_of(stage)]


def labelled(folders: list[Path]) -> dict[str, Path]:
    """The folders by the shortest tail of their paths that no other one ends in; one that is named twice comes once."""
    paths = dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders)
    found = {}
    for path in paths:
        tails = (path.parts[-length:] for length in range(1, len(path.parts) + 1))
        tail = next(tail for tail in tails if sum(other.parts[-len(tail) :] == tail for other in paths) == 1)
        found[str(Path(*tail))] = path
    return found


def picture_of(page: Path) -> Path:
    """Beside the page, under a name that no run uses: `curves.png` and `evaluation.png` are runs' own."""
    return page.with_name("report.png" if page.name == "report.html" else f"{page.stem}-report.png")


def sections(folder: Path) -> list[str]:
    """What a run left, as far as it is there."""
    found = [evaluation, card, completions, completion_table, configuration]
    return [section for make in found if (section := make(folder))]


def card(folder: Path) -> str:
    path = folder / CARD
    if not path.is_file():
        return ""
    text = html.escape(path.read_text(encoding="utf-8"))
    return f"<details open><summary>data card</summary><pre>{text}</pre></details>"
