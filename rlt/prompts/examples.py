"""What a row with a reasoning trace teaches, as token ids: a teacher to explain, a student to think and answer."""

from rlt.prompts.rendering import prompt_token_ids, render_question, student_answer
from rlt.prompts.styles import ReasoningFormat


def example(tokenizer, prompt: str, completion: str) -> dict[str, list[int]]:
    """Token ids of a prompt and what is to follow it, and the mask of what is trained on: that, and the end of turn.

    Prompt and completion are tokenised apart, as at sampling time.
    """
    (prompt_ids,) = prompt_token_ids(tokenizer, [prompt])
    completion_ids = tokenizer(f"{completion}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
    return {
        "input_ids": prompt_ids + completion_ids,
        "completion_mask": [0] * len(prompt_ids) + [1] * len(completion_ids),
    }


def trained_tokens(tokenizer, style: ReasoningFormat, trace: str, solution: str) -> int:
    """How many tokens a student is trained on by a row: of its answer, with the end of turn."""
    answer = f"{student_answer(style, trace, solution)}{tokenizer.eos_token}"
    return len(tokenizer(answer, add_special_tokens=False)["input_ids"])


def teacher_example(tokenizer, style: ReasoningFormat, row: dict) -> dict[str, list[int]]:
    """A teacher learns to explain.

    Args:
        row: with the teacher's `prompt` (rows.py).
    """
    return example(tokenizer, row["prompt"], f"{row['reasoning_trace'].strip()}\n\n{style.explanation_tags[1]}")


def student_example(tokenizer, style: ReasoningFormat, row: dict, system: str | None) -> dict[str, list[int]]:
    """A student learns to think and answer.

    Args:
        system: instead of the style's prompt.
    """
    prompt = render_question(tokenizer, style, row["question"], system)
    return example(tokenizer, prompt, student_answer(style, row["reasoning_trace"], row["solution"]))
