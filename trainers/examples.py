"""From rows to the examples of a trainer: what is tokenised, cut, paired or left out."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

from rlt.data.sources import RENAMED, TAKEN, say_dropped
from rlt.errors import Refused
from rlt.prompts.examples import ends_inside, student_example, teacher_example
from rlt.prompts.rendering import render_question
from rlt.prompts.rows import load_split_rows, plain_prompt, student_system, teaching_rows
from rlt.prompts.styles import ReasoningFormat
from rlt.runs.learned import check_held_out, check_training_rows, learned_questions
from rlt.schema import DataConfig, DPOSettings, GRPOSettings, SFTSettings, Tuning

logger = logging.getLogger("rlt")


def split_rows(settings: Tuning, style: ReasoningFormat) -> tuple[list[dict], list[dict]]:
    """Training and held-out rows, of which the model has learned none before where that can be had.

    Raises:
        Refused: an earlier life of the run held out, or trained on, others.
    """
    learned = learned_questions(settings.model_name_or_path)
    train_rows, eval_rows, _ = load_split_rows(settings, style, learned)
    check_held_out(Path(settings.output_dir), eval_rows)
    check_training_rows(Path(settings.output_dir), train_rows)
    return train_rows, eval_rows


def whole_pairs(settings: DPOSettings, rows: list[dict], tokenizer) -> list[dict[str, str]]:
    """Prompt, chosen and rejected text of the pairs that TRL would not cut at `max_length`.

    Raises:
        Refused: there is none.
    """
    bos, length = tokenizer.bos_token, settings.max_length
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    kept = []
    for row in rows:
        texts = [row["prompt"] + row[side] + tokenizer.eos_token for side in ("chosen", "rejected")]
        if length is None or max(map(len, tokenizer(texts, add_special_tokens=False).input_ids)) <= length:
            # TRL's tokenisation brings one of its own.
            prompt = row["prompt"].removeprefix(bos) if adds_bos else row["prompt"]
            kept.append({"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]})
    say_dropped({f"longer than max_length={length}": len(rows) - len(kept)}, settings.dataset_id_or_path)
    if not kept:
        raise Refused(f"max_length={length}: every pair has a longer side")
    return kept


def sft_examples(settings: SFTSettings, rows: list[dict], tokenizer, style: ReasoningFormat) -> list[dict]:
    """A teacher learns to explain, a student to think and answer; both from `reasoning_trace`.

    Raises:
        Refused: no row has one, or all are too long.
    """
    traced, source = [row for row in rows if row.get("reasoning_trace")], settings.dataset_id_or_path
    say_dropped({"no reasoning_trace": len(rows) - len(traced)}, source)
    if not traced:
        raise Refused(f"dataset_id_or_path={source}: no row has a reasoning_trace to learn from")
    student = settings.profile.learner == "student"
    _say_ends(Counter(end for row in traced for end in ends_inside(tokenizer, style, row, student)), source)
    if student:
        examples = [student_example(tokenizer, style, row, student_system(row, settings)) for row in traced]
    else:
        teaching = teaching_rows(traced, tokenizer, style, settings).rows
        examples = [teacher_example(tokenizer, style, row) for row in teaching]
    length = settings.max_length
    fitting = [e for e in examples if length is None or len(e["input_ids"]) <= length]
    say_dropped({f"longer than max_length={length}": len(examples) - len(fitting)}, source)
    if not fitting:
        raise Refused(f"max_length={length}: every row is longer")
    return fitting


def _say_ends(rows_with: Counter[str], source: str) -> None:
    if rows_with:
        found = ", ".join(f"{end} in {count}" for end, count in sorted(rows_with.items()))
        logger.warning(
            "%s: the texts of rows hold what ends a text or a section (%s), and a model learns to stop there: take it "
            "out of reasoning_trace and solution",
            source,
            found,
        )


def check_enough_questions(rows: list[dict], batch_size: int, num_generations: int) -> None:
    """That there are questions for one batch; of fewer the sampler gives none, and no step would be made.

    Args:
        batch_size: completions that are generated together.

    Raises:
        Refused: how many there are, and how many a batch has.
    """
    needed = batch_size // num_generations
    if len(rows) < needed:
        raise Refused(
            f"{len(rows)} usable rows to train on, and a batch has {needed} questions: lower train_batch_size or "
            "raise num_generations"
        )


def with_all_columns(rows: list[dict]) -> list[dict]:
    """TRL gives reward functions the columns of a batch's first row, and looks for them in all others."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def say_renamed(rows: list[dict]) -> None:
    """Name the columns that reach reward functions by another name than the source has them."""
    for column in sorted(TAKEN):
        if f"{RENAMED}{column}" in rows[0]:
            logger.warning("column %s reaches reward functions as %s%s: TRL has its own", column, RENAMED, column)


def as_dataset(rows: list[dict]) -> Dataset:
    """Rows whose values are of any JSON type; Arrow's tables would refuse a column of several types, and would give
    all objects of a column the same keys."""
    return Dataset.from_list([{"row": json.dumps(row)} for row in rows]).with_transform(_columns_of_rows)


def _columns_of_rows(batch: dict[str, list[str]]) -> dict[str, list]:
    rows = [json.loads(row) for row in batch["row"]]
    return {column: [row[column] for row in rows] for column in rows[0]}


def question_prompt(settings: GRPOSettings, style: ReasoningFormat) -> Callable[..., str]:
    """How plain GRPO asks: for an `Answer: …` line, for a verifier's sections, or the question alone."""

    def prompt(tokenizer, row: dict, data: DataConfig) -> str:
        return render_question(tokenizer, style, row["question"], student_system(row, data), settings.answer_line)

    return prompt if settings.answer_line or settings.verified else plain_prompt
