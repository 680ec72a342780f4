"""What a student is asked and what its teacher reads in front of the same completion (on-policy distillation).

A student writes its thought between tags and then the solution. Three prompts of the teacher fit that text, each in its
own way:

- `teaching`: the prompt that teachers here are trained with: question and solution, then the teacher's own turn, begun
  with the solution and the explanation's start tag. What follows there is an explanation, which is what a student
  thinks: the student's turn is begun with its thought's start tag, the teacher's with its explanation's, and both read
  on with the same tokens. The two end tags begin alike (`<|end_of_`, `</`) and then differ. The completion counts up to
  where they do, so that the teacher also says where to stop thinking. What the student writes then, its solution, is
  text that the teacher was never asked for, and does not count.
- `solution`: the student's own prompt, whose question is followed by the solution (SDFT, arXiv 2601.19897; OPSD,
  arXiv 2601.18734). For a teacher that answers as students do: the student's starting weights, or a larger model.
- `question`: the student's own prompt (GKD, arXiv 2306.13649). The whole completion counts, as with `solution`.
"""

from dataclasses import dataclass

from rlt.prompts.rendering import render_question, render_teacher_prompt
from rlt.prompts.styles import ReasoningFormat

TEACHER_PROMPTS = ("teaching", "solution", "question")
SHOWN = (
    "{question}\n\nThis is the solution, for you alone:\n\n{solution}\n\nNow answer the question in your own words, "
    "as if you had not seen it."
)


@dataclass(frozen=True)
class Prompts:
    """The texts before a completion: the student's, and its teacher's."""

    student: str
    teacher: str


def distillation_prompts(
    tokenizer, style: ReasoningFormat, row: dict, teacher_prompt: str, system: str | None
) -> Prompts:
    """Both prompts of a row with `question` and `solution`.

    Args:
        teacher_prompt: one of `TEACHER_PROMPTS`.
        system: the student's system prompt; None: the style's.
    """
    question, solution = row["question"], row["solution"]
    asked = render_question(tokenizer, style, question, system)
    if teacher_prompt == "question":
        return Prompts(asked, asked)
    if teacher_prompt == "solution":
        shown = SHOWN.format(question=question, solution=solution)
        return Prompts(asked, render_question(tokenizer, style, shown, system))
    teaching = render_teacher_prompt(tokenizer, style, question, solution, row.get("teacher_system_prompt"))
    return Prompts(f"{asked}{style.thought_tags[0]}\n\n", teaching)


def counted_tokens(tokenizer, style: ReasoningFormat, completion_ids: list[int], teacher_prompt: str) -> int:
    """How many of a completion's first tokens the teacher's prompt goes on with: all, or those of a thought.

    Of a thought's end tag those count that the explanation's begins with, too. A token that holds the end of the
    thought and the beginning of its tag does not.
    """
    if teacher_prompt != "teaching":
        return len(completion_ids)
    text = tokenizer.decode(completion_ids)
    end = text.find(style.thought_tags[1])
    if end < 0:
        return len(completion_ids)
    inside = _tokens_within(tokenizer, completion_ids, end)
    if len(tokenizer.decode(completion_ids[:inside])) < end:  # a token straddles
        return inside
    tag = tokenizer(style.explanation_tags[1], add_special_tokens=False)["input_ids"]
    written = completion_ids[inside:]
    same = next((i for i, (a, b) in enumerate(zip(tag, written, strict=False)) if a != b), min(len(tag), len(written)))
    return inside + same


def _tokens_within(tokenizer, ids: list[int], characters: int) -> int:
    """The most first tokens whose text is no longer than so many characters; by halves, as texts grow with tokens."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high + 1) // 2
        if len(tokenizer.decode(ids[:middle])) <= characters:
            low = middle
        else:
            high = middle - 1
    return low
