"""From scored completions to a student's rows: ranked within each question, filtered, and every loss counted.

A scored row has `question`, `solution`, `reasoning_trace`, `reward`, `matched` (its format), `student_tokens` (that a
student reads) and `trained_tokens` (that it learns).
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from math import sqrt

import numpy as np

from rlt.data.duplicates import similarity
from rlt.data.splits import normalised
from rlt.errors import Refused
from rlt.schema import TraceConfig
from rlt.traces.ranking import ranks, worth


@dataclass(frozen=True)
class Selection:
    """The rows that are kept, the number of rows and questions that came in, and why other rows are out."""

    kept: list[dict]
    scored: int
    questions: int
    dropped: dict[str, int]
    format_rate: float  # share of all scored rows


def rank(rows: list[dict], select: str = "reward", seed: int = 0) -> list[dict]:
    """The same rows with their `rank` among those of their question, 1 for the best; ties as they came.

    A question that a source repeats counts as one. Rows without a finite value come last.

    Args:
        select: one of `SELECTORS`; rows have its column.
        seed: of what is drawn by chance.
    """
    by_question = defaultdict(list)
    for row in rows:
        by_question[normalised(row["question"])].append(row)
    ranked = []
    for members in by_question.values():
        places = ranks([worth(row, select, seed, place) for place, row in enumerate(members)])
        ranked += sorted(({**row, "rank": place} for row, place in zip(members, places, strict=True)), key=_rank)
    return ranked


def _rank(row: dict) -> int:
    return row["rank"]


def select(rows: list[dict], config: TraceConfig) -> Selection:
    """Filter ranked rows: finite reward, format, length, reward quantile, near-duplicates, best of each question, and
    as many tokens as are asked for.

    With `select_student_tokens` the questions come in their order until the next trace would be too much: sets of all
    selectors have as many trained tokens, and where traces are longer fewer questions.

    Args:
        rows: ranked by `config.select`, those of a question in order of their rank.

    Raises:
        Refused: the teacher hardly ever has the format, or nothing is left.
    """
    matched = sum(row["matched"] for row in rows)
    check_format(matched, len(rows), config.min_format_rate)
    rewards = [row["reward"] for row in rows if np.isfinite(row["reward"])]
    least = float(np.quantile(rewards, config.min_reward_quantile)) if rewards else 0.0
    dropped: Counter[str] = Counter()
    kept: list[dict] = []
    of_question: dict[str, list[dict]] = defaultdict(list)
    seen: set[str] = set()
    budget = Budget(config.select_student_tokens)
    for row in rows:
        siblings = of_question[normalised(row["question"])]
        reason = _reason_against(row, siblings, seen, least, config)
        if reason is None and config.select_student_tokens is not None:
            reason = budget.against(row["trained_tokens"])
        if reason is not None:
            dropped[reason] += 1
            continue
        siblings.append(row)
        seen.add(_identity(row))
        kept.append(row)
    if not kept:
        raise Refused(f"none of {len(rows)} traces is left: {dict(dropped)}")
    return Selection(
        kept, len(rows), len({normalised(row["question"]) for row in rows}), dict(dropped), matched / len(rows)
    )


class Budget:
    """Tokens that a student's data may have.

    Args:
        tokens: None: any number.
    """

    def __init__(self, tokens: int | None):
        self.tokens, self.left = tokens, tokens

    def against(self, tokens: int) -> str | None:
        """Takes so many, or tells why not; once a text was too much, so is each that follows."""
        if self.left is None:
            return None
        if tokens > self.left:
            self.left = 0
            return f"beyond select_student_tokens={self.tokens}"
        self.left -= tokens
        return None


def check_format(matched: int, count: int, least: float, deviations: float = 0.0) -> None:
    """Refuse a teacher that has the format too seldom.

    Args:
        matched: of `count` completions.
        least: share of them.
        deviations: by how many standard deviations of the count `matched` may fall short, because more are to come.

    Raises:
        Refused: fewer completions have the format.
    """
    if matched < least * count - deviations * sqrt(count * least * (1 - least)):
        raise Refused(
            f"{matched / count:.1%} of {count} completions have the asked format (an explanation and its end tag), "
            f"below min_format_rate={least}: warm the teacher up, or use its own reasoning_format"
        )


def _identity(row: dict) -> str:
    return " ".join(f"{row['question']} {row['reasoning_trace']}".casefold().split())


def _reason_against(row: dict, siblings: list[dict], seen: set[str], least: float, config: TraceConfig) -> str | None:
    for column in {"reward": 1, config.select: 1}:
        if column in row and not np.isfinite(row[column]):
            return f"no finite {column}"
    if not row["matched"]:
        return "format"
    if row["student_tokens"] > config.max_student_length:
        return f"longer than max_student_length={config.max_student_length}"
    if row["reward"] < least:
        return f"below the reward quantile {config.min_reward_quantile}"
    alike = (similarity(row["reasoning_trace"], other["reasoning_trace"]) for other in siblings)
    if _identity(row) in seen or any(value >= config.near_duplicate_similarity for value in alike):
        return "near-duplicate"
    if len(siblings) >= config.keep_per_question:
        return f"not among the best {config.keep_per_question} of its question"
    return None
