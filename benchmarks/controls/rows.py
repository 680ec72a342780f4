"""What the matrix' runs read: questions of two generator tasks, and sets of rows of the same number of tokens."""

import json
import re
from itertools import chain, cycle
from pathlib import Path

import pandas
import settings

from rlt.data.sources import load_rows
from rlt.errors import Refused
from rlt.models.embedded import embedded_model_path
from rlt.models.loading import load_tokenizer
from rlt.prompts.examples import trained_tokens
from rlt.prompts.styles import load_format
from rlt.runs.folder import ALL_TRACES

SPARE = 5  # times as many are drawn, because small tasks repeat themselves
ROLES = ("format", "warmup", "teach", "collect")
LETTER = re.compile("[a-z]")
KNOWN = ("question", "solution", "task", "metadata")


def write_questions(folder: Path, seed: int) -> None:
    """`evaluate.jsonl`, the same for all seeds, and `SEED/{format,warmup,teach,collect}.jsonl`, tasks in turn."""
    taken: set[str] = set()
    write(folder / "evaluate.jsonl", _draw("evaluate", settings.FIRST_DRAW, taken))
    for number, role in enumerate(ROLES, start=1):
        rows = _draw(role, settings.FIRST_DRAW + 100 * (seed + 1) + number, taken)
        write(folder / str(seed) / f"{role}.jsonl", rows)


def _draw(role: str, seed: int, taken: set[str]) -> list[dict]:
    """Rows whose questions are not taken yet, which they are from then on."""
    drawn, size = [], settings.SIZES[role]
    for task in settings.FORMAT_TASKS if role == "format" else settings.TASKS:
        rows = load_rows(task, seed=seed, size=SPARE * size).rows
        new = list({problem_of(row): row for row in rows if problem_of(row) not in taken}.values())[:size]
        taken |= {problem_of(row) for row in new}
        drawn.append(new)
    return list(chain.from_iterable(zip(*drawn, strict=True)))


def problem_of(row: dict) -> str:
    """What two questions share that ask the same: 8*h = 64 and 8*x = 64, in whatever words."""
    metadata = row["metadata"]
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    return LETTER.sub("x", metadata["equation"]) if "equation" in metadata else row["question"]


def explanations(folder: Path) -> list[dict]:
    """The best explanation of each question of a collection by its reward, as it was sampled; where nothing was
    written, a full stop."""
    table = pandas.read_parquet(folder / ALL_TRACES).sort_values(["question_id", "rank"])
    rows = table.drop_duplicates("question_id").to_dict("records")
    return [{**row, "reasoning_trace": row["reasoning_trace"].strip() or "."} for row in rows]


def as_rows(explained: list[dict]) -> list[dict]:
    """Of a collection, what a student reads."""
    return [{key: row[key] for key in (*KNOWN, "reasoning_trace")} for row in explained]


def to_tokens(given: list[dict], budget: int) -> list[dict]:
    """Rows in order, from the first again behind the last, as long as a student trains on at most `budget` tokens."""
    tokenizer, style = load_tokenizer(str(embedded_model_path(settings.MODEL))), load_format("stratos")
    total, kept = 0, []
    for row in cycle(given):
        total += trained_tokens(tokenizer, style, row["reasoning_trace"], row["solution"])
        if total > budget:
            return kept
        kept.append(row)
    raise Refused("there is no row to repeat")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict]) -> None:
    """Raises:
    Refused: there are other rows already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if not path.exists():
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise Refused(f"{path} holds other rows than these settings make: name another --out")
