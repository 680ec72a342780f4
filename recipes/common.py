"""What the recipes share: their arguments, the server that they speak to, and how a text becomes data."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlt.errors import Refused, fail
from rlt.places import API_KEY_VARIABLE
from rlt.serving import Client

LIMIT_S = 600.0  # for one answer
EMBEDDED = "embedded/smollm2-135m-instruct"


def arguments(words: Sequence[str], **defaults: Any) -> SimpleNamespace:
    """`key=value` words over defaults, each of its default's kind; None stands for a text.

    Raises:
        Refused: an unknown key, or a value of another kind.
    """
    found = dict(defaults)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in defaults:
            raise Refused(f"{word}: give key=value; the keys are {', '.join(defaults)}")
        kind = str if defaults[key] is None else type(defaults[key])
        try:
            found[key] = kind(value)
        except ValueError as error:
            raise Refused(f"{key}={value}: give a value like {defaults[key]!r}") from error
    return SimpleNamespace(**found)


def connect(base_url: str) -> Client:
    """The key is that of RLT_API_KEY."""
    key = os.environ.get(API_KEY_VARIABLE)
    if not key:
        raise Refused(f"set {API_KEY_VARIABLE} to the key that serve.py said, or was given")
    return Client(base_url, key)


def shifted(prompt: Sequence[int], completion: Sequence[int], **values: Any) -> tuple[list[int], dict[str, list]]:
    """What a model reads and the inputs of its loss: targets are one ahead, and on the prompt all else is 0.

    Args:
        values: of each of the completion's tokens: a list, or one number for all.
    """
    ids, before, count = [*prompt, *completion], [0.0] * (len(prompt) - 1), len(completion)
    rows = {name: [each] * count if isinstance(each, int | float) else list(each) for name, each in values.items()}
    return ids[:-1], {
        "target_tokens": ids[1:],
        **{name: before + [float(v) for v in row] for name, row in rows.items()},
    }


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def rows_of(path: str | None, count: int) -> list[dict]:
    if path is None:
        sums = [(number * 7 % 40, number * 11 % 60) for number in range(count)]
        return [{"question": f"What is {a} + {b}?", "solution": f"{a} + {b} = {a + b}"} for a, b in sums]
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows or not all({"question", "solution"} <= row.keys() for row in rows):
        raise Refused(f"data={path}: every line must have a question and a solution")
    return rows


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """Bad input ends in one line."""
    try:
        main(sys.argv[1:])
    except (Refused, ConnectionError) as error:
        fail(error)
