"""Rows of reasoning-gym, a generator of questions with checks."""

import difflib
import importlib.util
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import yaml

from rlt.data.worked import worked_solution
from rlt.errors import Refused

GENERATOR = "reasoning_gym/"
NEEDS_CONFIG = {"composite"}  # tasks of the generator that cannot be made from a name alone
# Tasks whose rows are made by running programs that a language model wrote (`exec`), in the process that asks for them.
RUNS_PROGRAMS = {"codeio"}
# The generator makes row i of seed s as row i + 1 of seed s - 1. Seeds of runs are therefore further apart than any
# dataset is long.
SEED_STRIDE = 10_000_000
GENERATED_ROWS = 1024  # when no size is given


def generated_rows(name: str, seed: int, size: int) -> Iterable[dict]:
    task, options = task_and_options(name)
    import reasoning_gym

    try:
        entries = reasoning_gym.create_dataset(task, seed=seed * SEED_STRIDE, size=size, **options)
    except (TypeError, AssertionError) as error:
        raise Refused(f"{GENERATOR}{name}: {error}") from None
    for entry in entries:
        trace = worked_solution(task, entry["metadata"])
        known = {**entry["metadata"], "task_options": options} if options else entry["metadata"]  # checks need them
        metadata = json.dumps(known, default=str)
        row = {"question": entry["question"], "solution": entry["answer"], "reasoning_trace": trace, "task": task}
        yield {**row, "metadata": metadata}


def task_and_options(name: str) -> tuple[str, dict]:
    """`gcd/max_value:20` gives ("gcd", {"max_value": 20}).

    Raises:
        Refused: no such task, one that would run programs, or an option without a value.
    """
    task, *settings = name.split("/")
    _check_task(task)
    options = {}
    for option in settings:
        key, colon, value = option.partition(":")
        if not colon:
            raise Refused(f"{GENERATOR}{name}: {option!r} is no option:value")
        options[key] = yaml.safe_load(value)
    return task, options


def _check_task(task: str) -> None:
    if task in RUNS_PROGRAMS:
        raise Refused(
            f"{GENERATOR}{task} runs programs that a language model wrote to make its rows: name another task"
        )
    tasks = sorted(set(generator_tasks()) - RUNS_PROGRAMS)
    if task not in tasks:
        close = difflib.get_close_matches(task, tasks, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else f"; it has {', '.join(tasks)}"
        raise Refused(f"reasoning_gym has no task {task!r}{hint}")


@cache
def generator_tasks() -> list[str]:
    """Names of reasoning_gym's tasks, read from its source, because importing it takes seconds.

    Raises:
        Refused: the package is not installed.
    """
    found = importlib.util.find_spec("reasoning_gym")
    if found is None or found.origin is None:
        raise Refused("the package reasoning-gym is not installed: run ./setup.sh")
    literal = re.compile(r"register_dataset\(\s*\"(\w+)\"")
    constant = re.compile(r"^DATASET_NAME\s*=\s*\"(\w+)\"", re.MULTILINE)
    names = set()
    for path in Path(found.origin).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "register_dataset(" in text:
            names.update(literal.findall(text), constant.findall(text))
    return sorted(names - NEEDS_CONFIG)
