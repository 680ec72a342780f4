"""All completions of a run, as data for the table that `table.js` shows page by page.

Read from `completions/step-*.parquet` of a training run, `all/traces.parquet` of a collection, `answers.parquet` of an
evaluation. The page carries the data as JSON and needs no network; a browser draws one page of rows at a time.
"""

import html
import json
import math
from pathlib import Path
from typing import Any

from rlt.reports.frames import frame_of
from rlt.runs.folder import ALL_TRACES, ANSWERS, COMPLETIONS

# In this order, and shown from the start; other columns of a file follow, to be asked for.
NUMBERS = (
    *("step", "question_id", "reward", "rank", "right", "advantage", "matched", "tokens"),
    *("solution_log_prob_reward", "kl_reward", "match_reward"),
)
TEXTS = ("question", "solution", "completion", "answer")
# What repeats other columns, token by token or in another form.
LEFT_OUT = ("prompt", "token_scores", "reasoning_trace", "messages", "teacher_system_prompt", "student_system_prompt")
CHARACTERS = 40_000_000  # of a page, about: a browser holds this with ease


def completion_table(folder: Path) -> str:
    """The table and its data; empty where a run left no completions."""
    import pandas

    files = [frame for file in files_of(folder) if (frame := frame_of(file)) is not None]
    if not files:
        return ""
    frame = pandas.concat(files, ignore_index=True)
    shown = thinned(named(frame), CHARACTERS)
    count = f"{len(frame)} completions" if len(shown) == len(frame) else f"{len(shown)} of {len(frame)} completions"
    data = embedded({"columns": [column(name, shown[name]) for name in order(shown)]})
    return (
        f"<details open class=table><summary>all completions: {count} of {len(files)} "
        f"file{'s' * (len(files) > 1)}</summary>"
        f'<div class=completions data-name="{html.escape(folder.name)}"><script type="application/json">{data}</script>'
        "<noscript><p>The table needs JavaScript; without it, the files hold the same.</p></noscript></div></details>"
    )


def files_of(folder: Path) -> list[Path]:
    steps = sorted((folder / COMPLETIONS).glob("step-*.parquet"))
    return steps or [path for path in (folder / ALL_TRACES, folder / ANSWERS) if path.is_file()][:1]


def named(frame):
    """By one set of names: an evaluation's `text` is its completion; an older run's question stands in its prompt."""
    frame = frame.rename(columns={"text": "completion"} if "completion" not in frame else {})
    return frame if "question" in frame else frame.rename(columns={"prompt": "question"})


def thinned(frame, characters: int):
    """Every k-th row, so that all texts together have about as many characters as a page may."""
    total = sum(int(frame[name].str.len().sum()) for name in order(frame) if is_text(frame[name]))
    return frame.iloc[:: max(1, math.ceil(total / characters))]


def order(frame) -> list[str]:
    """The columns of a table: numbers and texts that lead, then others of the file in its own order."""
    usable = [
        name for name in frame.columns if name not in LEFT_OUT and (is_text(frame[name]) or is_number(frame[name]))
    ]
    leading = [name for name in (*NUMBERS, *TEXTS) if name in usable]
    return [*leading, *(name for name in usable if name not in leading)]


def is_number(series) -> bool:
    return series.dtype.kind in "biuf"


def is_text(series) -> bool:
    return not is_number(series) and all(isinstance(value, str) for value in series.dropna())


def column(name: str, series) -> dict[str, Any]:
    """`name`, `kind`, whether it is `shown`, and `values`; of a text these are places in `texts`, each held once."""
    several = name.startswith("reward/")
    found: dict[str, Any] = {"name": name, "shown": several or name in (*NUMBERS, *TEXTS)}
    if is_number(series):
        numbers = (value.item() if hasattr(value, "item") else value for value in series)
        flag = series.dtype.kind == "b"
        return {**found, "kind": "flag" if flag else "number", "values": [rounded(value) for value in numbers]}
    places: dict[str, int] = {}
    values = [places.setdefault(text, len(places)) if isinstance(text, str) else None for text in series]
    return {**found, "kind": "text", "values": values, "texts": list(places)}


def rounded(value: float) -> float | int | bool | None:
    """To six digits; JSON has no NaN and no infinity."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def embedded(data: Any) -> str:
    """JSON that stays inside its script element, whatever a model wrote."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
