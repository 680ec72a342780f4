"""What is measured of texts beside whether their answers are right."""

import json
import re
from collections.abc import Iterable
from statistics import mean

from rlt.data.worked import worked_solution
from rlt.estimates import finite_mean

EVERY_QUESTION = "accuracy, every question once"  # of a student that learns from all of them, whatever their tokens
DIVISION = re.compile(r"(\d+) ?[/÷:] ?(\d+) ?= ?(\d+)")


def divisions(text: str) -> set[tuple[str, ...]]:
    """Every division that a text states, with its result: 72 / 6 = 12."""
    return {found.groups() for found in DIVISION.finditer(text)}


def right_steps(texts: Iterable[str], worked: Iterable[str]) -> float:
    """Share of texts that hold every division of the worked solution; rows without one are left out."""
    wanted = [(text, divisions(way)) for text, way in zip(texts, worked, strict=True)]
    return mean([float(steps <= divisions(text)) for text, steps in wanted if steps] or [float("nan")])


def answer_position(texts: Iterable[str], solutions: Iterable[str]) -> float:
    """Where the solution first stands in a text, as a share of its length; texts without it are left out."""
    places = []
    for text, solution in zip(texts, solutions, strict=True):
        found = re.search(rf"(?<![\w/]){re.escape(solution)}(?![\w/])", text)
        places.append(found.start() / len(text) if found else float("nan"))
    return finite_mean(places)


def in_format(answers: Iterable[object]) -> float:
    """Share of answers that stand between their tags; a table has None or NaN where there is none."""
    return mean(float(isinstance(answer, str)) for answer in answers)


def worked_of(row: dict) -> str:
    """The worked solution of a generator's row."""
    metadata = row["metadata"]
    return worked_solution(row["task"], json.loads(metadata) if isinstance(metadata, str) else metadata)
