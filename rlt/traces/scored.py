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
from rlt.traces.ranking import SCORED_WITH, check_columns, worth
from rlt.traces.selection import Budget, rank

FIGURES = ("reward", "likelihood", "rsr", "student_tokens", "trained_tokens")
OF_ALL = ("completions", "rank", "best_index")  # columns that say nothing of a completion by itself


def one_by_one(row: dict, style: ReasoningFormat, place: str) -> Iterator[dict]:
    """A row for each of its completions, with the completion's own scores and the trace that a student learns.

    Args:
        place: of the row, for messages.

    Raises:
        Refused: a score is no number, or there are not as many as completions.
    """
    several = row.get("completions")
    answers = [row["completion"]] if several is None else several
    row = {key: value for key, value in row.items() if key not in OF_ALL}
    lists = {} if several is None else row
    by_answer = {key: value for key, value in lists.items() if _is_of_each(key, value, answers)}
    rest = {key: value for key, value in row.items() if key not in by_answer}
    for key in FIGURES:
        values = by_answer.get(key, [row.get(key)])
        if not all(isinstance(value, int | float | None) for value in values):
            wanted = "a number" if several is None else f"a list of {len(answers)} numbers, one for each completion"
            raise Refused(f"{place}: {key} must be {wanted}, not {row[key]!r}")
    for number, answer in enumerate(answers):
        explanation, closed = split_completion(style, answer)
        trace = explanation.strip()
        own = {"matched": closed and bool(trace)} if "matched" not in row else {}
        own |= {key: values[number] for key, values in by_answer.items()}
        yield {**rest, **own, "completion": answer, "reasoning_trace": trace}


def _is_of_each(key: str, value: Any, answers: list[str]) -> bool:
    """Whether a column has a cell for each completion: what score.py wrote, and who wrote the completions."""
    if not isinstance(value, list) or len(value) != len(answers):
        return False
    return key in ("sources", "matched") or all(isinstance(one, int | float | None) for one in value)


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
    each: list[dict[str, Any]] = [
        one for number, row in enumerate(rows, start=1) for one in one_by_one(row, style, f"{place} row {number}")
    ]
    check_columns(each, select, place)
    if student_tokens is not None and any(row.get("trained_tokens") is None for row in each):
        lacks = f"{place} has rows without 'trained_tokens'"
        raise Refused(f"select_student_tokens={student_tokens}: {lacks}: {SCORED_WITH}")
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
