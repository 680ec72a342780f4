"""From rows of data to rows of a trainer: prompts are rendered; unusable rows are left out, counted and said."""

import logging
from collections import Counter
from collections.abc import Callable

from rlt.data.sources import Rows, load_rows, say_dropped
from rlt.data.splits import check_disjoint, hold_out, questions_of
from rlt.errors import Refused
from rlt.prompts.rendering import (
    prompt_token_ids,
    render_conversation,
    render_student_reading,
    render_teacher_prompt,
)
from rlt.prompts.spans import tokenize_with_spans
from rlt.prompts.styles import ReasoningFormat
from rlt.schema import DataConfig

REPEATED = "repeats an evaluation question"

logger = logging.getLogger("rlt")


def load_split_rows(
    data: DataConfig, style: ReasoningFormat, learned: frozenset[str] | set[str] = frozenset()
) -> tuple[list[dict], list[dict], dict[str, int]]:
    """Training and evaluation rows, disjoint by question.

    Args:
        learned: normalised questions that the model was trained on before; others are held out, if there are any.

    Returns:
        training rows, evaluation rows, and how many rows of the source are not trained on, by reason.

    Raises:
        Refused: nothing is left to train on, or both sources share questions.
    """
    tags = (style.thought_tags, style.solution_tags)
    options = {"split": data.dataset_split, "seed": data.dataset_seed, "tags": tags}
    loaded = load_rows(data.dataset_id_or_path, size=data.dataset_size, **options)
    say_dropped(loaded.dropped, data.dataset_id_or_path)
    rows, held_out, left_out = loaded.rows, [], Counter(loaded.dropped)
    if data.eval_dataset_id_or_path is not None:
        evaluation = load_rows(data.eval_dataset_id_or_path, size=data.eval_size or None, **options)
        say_dropped(evaluation.dropped, data.eval_dataset_id_or_path)
        held_out = evaluation.rows
        check_disjoint(rows, held_out)
    elif data.eval_size:
        if data.eval_size >= len(rows):
            raise Refused(f"eval_size={data.eval_size} leaves nothing of {len(rows)} rows to train on")
        rows, held_out, repeated = hold_out(rows, data.eval_size, data.dataset_seed, learned)
        say_dropped({REPEATED: repeated}, data.dataset_id_or_path)
        left_out += Counter({"held out": len(held_out), REPEATED: repeated})
    if not rows:
        raise Refused(f"dataset_id_or_path={data.dataset_id_or_path}: no usable row, {dict(loaded.dropped)}")
    if known := len(questions_of(held_out) & learned):
        logger.warning("%d of %d held-out questions: the model was trained on them before", known, len(held_out))
    return rows, held_out, dict(left_out)


def teaching_rows(
    rows: list[dict], tokenizer, style: ReasoningFormat, data: DataConfig, student_tokenizer=None
) -> Rows:
    """Rows with the teacher's `prompt`; those with a too long prompt or an unscorable solution are left out.

    Args:
        student_tokenizer: of a student that has one of its own.
    """
    own = student_tokenizer or tokenizer
    kept, dropped = [], Counter()
    for row in rows:
        row = dict(row)
        if data.use_dataset_system_prompt and row.get("system"):
            row["teacher_system_prompt"] = row["system"]
        reason = add_teaching_prompt(row, tokenizer, style, data.max_prompt_length, own)
        if reason is None:
            kept.append(row)
        else:
            dropped[reason] += 1
    say_dropped(dropped, data.dataset_id_or_path)
    if not kept:
        raise Refused(f"dataset_id_or_path={data.dataset_id_or_path}: no usable row, {dict(dropped)}")
    return Rows(kept, dict(dropped))


def add_teaching_prompt(row: dict, tokenizer, style: ReasoningFormat, most: int, own) -> str | None:
    """Give a row the teacher's `prompt`; why it cannot be taught, if it cannot.

    Args:
        most: tokens of the prompt.
        own: the student's tokenizer.
    """
    system = row.get("teacher_system_prompt")
    row["prompt"] = render_teacher_prompt(tokenizer, style, row["question"], row["solution"], system)
    if len(prompt_token_ids(tokenizer, [row["prompt"]])[0]) > most:
        return f"prompt longer than max_prompt_length={most}"
    reading = render_student_reading(own, style, row["question"], row["solution"], "\n\n")
    (read,) = tokenize_with_spans(own, [reading])
    solution = read.spans["solution"]
    if not solution:
        return "solution without a token that lies wholly inside its tags"
    if own.unk_token_id in [read.ids[index] for index in solution] and own.unk_token not in row["solution"]:
        return "solution that the student's tokenizer has no tokens for"
    return None


def student_system(row: dict, data: DataConfig) -> str | None:
    """The system prompt that a row brings for a student; None stands for the system prompt of the style."""
    return (row.get("system") if data.use_dataset_system_prompt else None) or row.get("student_system_prompt")


def plain_prompt(tokenizer, row: dict, data: DataConfig) -> str:
    """The question as a conversation, with the row's own system text when asked for."""
    system = row.get("system") if data.use_dataset_system_prompt else None
    return render_conversation(tokenizer, row["question"], system)


def question_rows(rows: list[dict], tokenizer, data: DataConfig, render: Callable[..., str]) -> list[dict]:
    """Rows of plain GRPO with the student's `prompt`.

    Args:
        render: of tokenizer, row and data.
    """
    kept, dropped = [], Counter()
    for row in rows:
        prompt = render(tokenizer, row, data)
        if len(prompt_token_ids(tokenizer, [prompt])[0]) > data.max_prompt_length:
            dropped[f"prompt longer than max_prompt_length={data.max_prompt_length}"] += 1
            continue
        kept.append({**row, "prompt": prompt})
    say_dropped(dropped, data.dataset_id_or_path)
    if not kept:
        raise Refused(f"dataset_id_or_path={data.dataset_id_or_path}: no usable row, {dict(dropped)}")
    return kept
