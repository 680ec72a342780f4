"""A student's data out of rows that are scored already: of a collection's `all/traces.parquet`, or of score.py.

No model is asked, so that several selectors can choose among the same traces.
"""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from rlt.data.splits import normalised
from rlt.errors import Refused
from rlt.prompts.rendering import split_completion
from rlt.prompts.styles import ReasoningFormat
from rlt.traces.ranking import check_columns, worth
from rlt.traces.selection import Budget, rank

FIGURES = ("reward", "likelihood", "rsr", "match_reward", "student_tokens", "trained_tokens")


def one_by_one(row: dict, style: ReasoningFormat) -> Iterator[dict]:
    """A row for each of its completions, with the completion's own scores and the trace that a student learns."""
    several = row.get("completions")
    answers = [row["completion"]] if several is None else several
    for place, answer in enumerate(answers):
        own = {key: row[key][place] if isinstance(row[key], list) else row[key] for key in FIGURES if key in row}
        if "matched" not in row:
            own["matched"] = own.get("match_reward") == 0
        trace = split_completion(style, answer)[0].strip()
        kept = {key: value for key, value in row.items() if key not in ("completions", "rank", "best_index")}
        yield {**kept, **own, "completion": answer, "reasoning_trace": trace}


def select_scored(
    rows: list[dict], style: ReasoningFormat, select: str, seed: int, student_tokens: int | None, place: str
) -> tuple[list[dict], dict[str, int]]:
    """The best trace of each question that has one in the format, and why other rows are out.

    Args:
        rows: with `question`, `solution`, `completion` or `completions`, and their scores.
        seed: of select=random.
        student_tokens: that a student is trained on; questions come in their order until the next trace would be too
            much; None: all of them.
        place: where the rows stand, for messages.

    Raises:
        Refused: the rows lack a score, or nothing is left.
    """
    each: list[dict[str, Any]] = [one for row in rows for one in one_by_one(row, style)]
    check_columns(each, select, place)
    if student_tokens is not None and any(row.get("trained_tokens") is None for row in each):
        raise Refused(f"select_student_tokens={student_tokens}: {place} has rows without 'trained_tokens'")
    dropped: Counter[str] = Counter()
    kept, budget = [], Budget(student_tokens)
    for _, members in groupby(rank(each, select, seed), key=lambda row: normalised(row["question"])):
        known = [row for row in sorted(members, key=itemgetter("rank")) if math.isfinite(worth(row, select, seed, 0))]
        good = [row for row in known if row["matched"]]
        reason = f"questions without a trace in the format that has a finite {select}" if not good else None
        reason = reason or budget.against(good[0]["trained_tokens"] if student_tokens is not None else 0)
        if reason is None:
            kept.append(good[0])
        else:
            dropped[reason] += 1
    if not kept:
        raise Refused(f"{place}: no trace is left: {dict(dropped)}")
    return kept, dict(dropped)
