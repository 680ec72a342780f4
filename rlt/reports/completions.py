"""The best, the median and the worst completions, each token coloured by what its reward saw.

The redder, the less the student expected a token (its log-prob, down to -8 nats). In the second reading, the more
violet, the more the teacher knew what the student could not (KL, up to 8 nats);
green is what the student expected more.
"""

import html
import json
from pathlib import Path

from rlt.estimates import best_median_worst
from rlt.reports.frames import frame_of
from rlt.runs.folder import ALL_TRACES, COMPLETIONS

FULL = 8.0  # nats at which a colour is at its strongest
SURPRISED = (200, 60, 40)
TEACHER_KNEW, STUDENT_KNEW = (130, 60, 160), (70, 150, 80)


def completions(folder: Path) -> str:
    """Best, median and worst completion of the last step, or of all traces; empty where a run left none."""
    files = sorted((folder / COMPLETIONS).glob("step-*.parquet")) or sorted(folder.glob(ALL_TRACES))
    found = ((file, frame) for file in reversed(files) if (frame := frame_of(file)) is not None)
    file, frame = next(found, (None, None))
    if file is None or frame is None:
        return ""
    score = (
        "reward" if "reward" in frame else next((name for name in map(str, frame) if name.startswith("reward/")), None)
    )
    if score is None:
        return ""
    if "token_scores" in frame and frame["token_scores"].notna().any():
        frame = frame[frame["token_scores"].notna()]
    rows = [frame.iloc[place] for place in best_median_worst(frame[score].astype(float).tolist())]
    shown = [completion(row, name) for row, name in zip(rows, names(len(rows)), strict=True)]
    key = legend() if any(isinstance(row.get("token_scores"), str) for row in rows) else ""
    return f"<details open><summary>completions of {html.escape(file.stem)}</summary>{key}{''.join(shown)}</details>"


def legend() -> str:
    """What the colours say, from none to the strongest."""
    ramps = (
        (SURPRISED, f"the student expected the token less (log-prob 0 to -{FULL:g} nats or below)"),
        (TEACHER_KNEW, f"the teacher expected it more than the student (KL 0 to +{FULL:g} nats or above)"),
        (STUDENT_KNEW, f"the student expected it more than the teacher (KL 0 to -{FULL:g} nats or below)"),
    )
    items = (
        f'<li><span class=ramp style="background:linear-gradient(90deg,{rgba(colour, 0)},{rgba(colour, 1)})"></span>'
        f"{text}</li>"
        for colour, text in ramps
    )
    return f"<ul class=legend aria-label=colours>{''.join(items)}</ul>"


def rgba(colour: tuple[int, int, int], strength: float) -> str:
    """Of a strength from 0 to 1."""
    return f"rgba({','.join(map(str, colour))},{0.75 * strength:.2f})"


def names(count: int) -> tuple[str, ...]:
    return {0: (), 1: ("the only one",), 2: ("best", "worst"), 3: ("best", "median", "worst")}[count]


def completion(row, name: str) -> str:
    """Its numbers, and its text beside what it answers."""
    listed = ", ".join(f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float))
    return (
        f"<h3>{name}</h3><p class=n>{html.escape(listed)}</p>"
        f"<div class=beside><div>{asked(row)}</div><div>{written(row)}</div></div>"
    )


def asked(row) -> str:
    """The question and the solution; of an older run, which wrote neither, the prompt."""
    names = ("question", "solution") if isinstance(row.get("question"), str) else ("prompt",)
    shown = ((name, row[name]) for name in names if isinstance(row.get(name), str))
    return "".join(f"<h4>{name}</h4><pre>{html.escape(text)}</pre>" for name, text in shown)


def written(row) -> str:
    """The completion, coloured where there are token scores."""
    scores = row.get("token_scores")
    if not isinstance(scores, str):
        return f"<h4>completion</h4><pre>{html.escape(row['completion'])}</pre>"
    found = json.loads(scores)
    student = [(text, -log_prob, f"log p_student {log_prob:.2f}") for text, log_prob, *_ in found["explanation"]]
    solution = [(text, -log_prob, f"log p_student {log_prob:.2f}") for text, log_prob in found["solution"]]
    kl = [
        (text, abs(k), f"KL {k:+.2f}", STUDENT_KNEW if k < 0 else TEACHER_KNEW) for text, _, k in found["explanation"]
    ]
    return (
        "<h4>the student's log-probs of the explanation, then of the solution</h4>"
        f"<pre>{''.join(token(*entry, SURPRISED) for entry in student)}<hr>"
        f"{''.join(token(*entry, SURPRISED) for entry in solution)}</pre>"
        f"<h4>KL from the student to the teacher</h4><pre>{''.join(token(*entry) for entry in kl)}</pre>"
    )


def token(text: str, nats: float, title: str, colour: tuple[int, int, int]) -> str:
    """One token with its number on hover; the stronger the colour, the more nats."""
    strength = min(1.0, max(0.0, nats) / FULL)
    return f'<span title="{html.escape(title)}" style="background:{rgba(colour, strength)}">{html.escape(text)}</span>'
