"""What the replication's runs read: questions of two generator tasks, and trace sets of the same number of tokens."""

import json
from itertools import chain
from pathlib import Path

import pandas

from rlt.data.sources import load_rows
from rlt.errors import Refused
from rlt.models.embedded import embedded_model_path
from rlt.models.loading import load_tokenizer
from rlt.prompts.rendering import student_answer
from rlt.prompts.styles import load_format

# Of one step each, that has to be found: what divides what.
TASKS = (
    "reasoning_gym/fraction_simplification/max_value:12/min_factor:2/max_factor:9/styles:[plain]",
    "reasoning_gym/simple_equations/min_terms:1/max_terms:1/max_value:12",
)
# On which answering in sections is learned.
FORMAT_TASKS = ("reasoning_gym/leg_counting/min_animals:2/max_animals:2/max_instances:5",)
MODEL = "embedded/smollm2-135m-instruct"
# Rows of each task; questions that are evaluated are in none of the others.
SIZES = {"evaluate": 80, "format": 80, "warmup": 32, "teach": 48, "collect": 96}
SPARE = 5  # times as many are drawn, because small tasks repeat themselves


def write_questions(folder: Path, seeds: range) -> None:
    """`evaluate.jsonl` for all, and `SEED/{format,warmup,teach,collect}.jsonl`, tasks in turn."""
    seen: set[str] = set()
    _write(folder / "evaluate.jsonl", _draw("evaluate", 0, seen))
    for seed in seeds:
        taken = set(seen)
        for number, role in enumerate(("format", "warmup", "teach", "collect"), start=1):
            _write(folder / str(seed) / f"{role}.jsonl", _draw(role, 100 * seed + number, taken))


def _draw(role: str, seed: int, taken: set[str]) -> list[dict]:
    """Rows whose questions are not taken yet, which they are from then on."""
    drawn = []
    for task in FORMAT_TASKS if role == "format" else TASKS:
        rows = load_rows(task, seed=seed, size=SPARE * SIZES[role]).rows
        new = list({row["question"]: row for row in rows if row["question"] not in taken}.values())[: SIZES[role]]
        taken |= {row["question"] for row in new}
        drawn.append(new)
    return list(chain.from_iterable(zip(*drawn, strict=True)))


def write_equal(sets: dict[str, list[dict]], folder: Path) -> int:
    """Each set's first rows, to as many tokens that a student is trained on as the smallest set has; returns these."""
    tokenizer, style = load_tokenizer(str(embedded_model_path(MODEL))), load_format("stratos")
    lengths = {
        name: [len(tokenizer.encode(student_answer(style, r["reasoning_trace"], r["solution"]))) for r in rows]
        for name, rows in sets.items()
    }
    budget = min(map(sum, lengths.values()))
    for name, rows in sets.items():
        total, kept = 0, []
        for row, length in zip(rows, lengths[name], strict=True):
            if total + length > budget:
                break
            total += length
            kept.append(row)
        _write(folder / f"{name}.jsonl", kept)
    return budget


def unedited(folder: Path) -> list[dict]:
    """Every trace of a collection as it was sampled; where nothing was written, a full stop."""
    rows = pandas.read_parquet(folder / "all" / "traces.parquet").to_dict("records")
    return [{**_known(row), "reasoning_trace": row["reasoning_trace"].strip() or "."} for row in rows]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mean_reward(folder: Path) -> float:
    """Mean reward of a collection's traces, those without a finite reward left out."""
    rewards = pandas.read_parquet(folder / "all" / "traces.parquet")["reward"]
    return float(rewards[rewards.abs() < float("inf")].mean())


def _known(row: dict) -> dict:
    return {key: row[key] for key in ("question", "solution", "task", "metadata")}


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if not path.exists():
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise Refused(f"{path} holds other rows than these settings make: name another --out")
