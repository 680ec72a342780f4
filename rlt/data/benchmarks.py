"""Benchmarks by name, as they stand on the hub: `benchmark/aime24`, `benchmark/math500`, `benchmark/gpqa_diamond`."""

import random
from collections.abc import Iterable
from dataclasses import dataclass

from rlt.errors import Refused

PREFIX = "benchmark/"
LETTERS = "ABCD"


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is, and which of its columns are the question and the answer."""

    hub_name: str
    split: str
    question: str
    answer: str
    config: str | None = None
    wrong: tuple[str, ...] = ()  # of multiple choice: the other options


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer"),
    "gpqa_diamond": Benchmark(
        "Idavidrein/gpqa",
        "train",
        "Question",
        "Correct Answer",
        "gpqa_diamond",
        ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    ),
}


def check_benchmark(name: str) -> None:
    """Refuse a name that is no benchmark.

    Raises:
        Refused: no such benchmark.
    """
    if name not in BENCHMARKS:
        raise Refused(f"there is no benchmark {name!r}: use one of {', '.join(BENCHMARKS)}")


def benchmark_rows(name: str) -> Iterable[dict]:
    """Rows of `question` and `solution`. The number of a row decides the order of its multiple-choice options.

    Raises:
        Refused: no such benchmark, or it cannot be loaded from the hub.
    """
    check_benchmark(name)
    from datasets import load_dataset

    known = BENCHMARKS[name]
    try:
        rows = load_dataset(known.hub_name, known.config, split=known.split)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise Refused(f"{PREFIX}{name} ({known.hub_name}) could not be loaded from the hub: {reason}") from error
    for number, row in enumerate(map(dict, rows)):
        yield _with_options(row, known, number) if known.wrong else _plain(row, known)


def _plain(row: dict, known: Benchmark) -> dict:
    return {"question": row[known.question], "solution": str(row[known.answer])}


def _with_options(row: dict, known: Benchmark, number: int) -> dict:
    options = [row[known.answer], *(row[column] for column in known.wrong)]
    order = list(range(len(options)))
    random.Random(number).shuffle(order)
    listed = "\n".join(f"{letter}) {options[place]}" for letter, place in zip(LETTERS, order, strict=True))
    return {"question": f"{row[known.question]}\n\n{listed}", "solution": LETTERS[order.index(0)]}
