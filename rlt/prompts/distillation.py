"""What a student is asked and what its teacher reads in front of the same completion (on-policy distillation).

A student writes its thought between tags and then the solution. Three prompts of the teacher fit that text, each in its
own way:

- `teaching`: the prompt that teachers here are trained with: question and solution, then the teacher's own turn, begun
  with the solution and the explanation's start tag. What follows there is an explanation, which is what a student
  thinks: the student's turn is begun with its thought's start tag, the teacher's with its explanation's, and both read
  on with the same tokens. The two end tags begin alike (`<|end_of_`, `</`) and then part: up to there the teacher is
  read, so that it also says where to stop thinking. What comes behind is known without asking: the rest of the
  student's end tag (as is its start tag), the solution's start tag, and, where the thought comes to it, the solution
  that the teacher was shown, which the student has to find likely behind its own thought (the solution part of the
  reward of arXiv 2506.08388). Without these parts nothing holds a student to its format, and weights that move towards
  a teacher's texts lose it within a few steps. Behind a thought that comes to another result the solution would teach
  the student not to say what it has found.
- `solution`: the student's own prompt, whose question is followed by the solution (SDFT, arXiv 2601.19897; OPSD,
  arXiv 2601.18734). For a teacher that answers as students do: the student's starting weights, or a larger model.
- `question`: the student's own prompt (GKD, arXiv 2306.13649). The whole completion counts, as with `solution`.
"""

import os
from collections.abc import Callable
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
    tokenizer, style: ReasoningFormat, row: dict, teacher_prompt: str, system: str | None, teacher_tokenizer
) -> Prompts:
    """Both prompts of a row with `question` and `solution`.

    Args:
        teacher_prompt: one of `TEACHER_PROMPTS`.
        system: the student's system prompt; None: the style's.
        teacher_tokenizer: of the same vocabulary, with the chat template that the teacher knows.
    """
    question, solution = row["question"], row["solution"]
    asked = render_question(tokenizer, style, question, system)
    if teacher_prompt == "question":
        return Prompts(asked, render_question(teacher_tokenizer, style, question, system))
    if teacher_prompt == "solution":
        shown = SHOWN.format(question=question, solution=solution)
        return Prompts(asked, render_question(teacher_tokenizer, style, shown, system))
    teaching = render_teacher_prompt(teacher_tokenizer, style, question, solution, row.get("teacher_system_prompt"))
    return Prompts(f"{asked}{style.thought_tags[0]}\n\n", teaching)


@dataclass(frozen=True)
class Completion:
    """What is read behind both prompts, and what of it the teacher says.

    Attributes:
        student_ids: behind the student's prompt.
        teacher_ids: behind the teacher's prompt; as many tokens as the teacher says the distribution of.
        All later ones of `student_ids` are an answer, each of whose tokens is known.
    """

    student_ids: list[int]
    teacher_ids: list[int]


def read_completion(
    tokenizer,
    style: ReasoningFormat,
    ids: list[int],
    teacher_prompt: str,
    solution: str | None,
    comes_to: Callable[[str, str], bool],
) -> Completion:
    """A sampled completion as both models read it.

    Args:
        ids: as it was sampled, with the token that ends it.
        teacher_prompt: one of `TEACHER_PROMPTS`.
        solution: of the question, read behind a thought that comes to it; None: what follows a thought is left out.
        comes_to: whether a thought does, of it and the solution.
    """
    if teacher_prompt != "teaching":
        return Completion(ids, ids)
    thought, ended = thought_of(tokenizer, style, ids)
    if not ended:  # cut off amid its thought
        return Completion(thought, thought)
    start, end = style.solution_tags
    answer = f"{style.thought_tags[1]}{style.delimiter}{start}"
    if solution is not None and comes_to(tokenizer.decode(thought), solution):
        answer += f"{solution}{end}{tokenizer.eos_token}"
    behind = tokenizer(answer, add_special_tokens=False)["input_ids"]
    tag = tokenizer(style.explanation_tags[1], add_special_tokens=False)["input_ids"]
    alike = len(os.path.commonprefix([tag, behind]))
    kept = len(behind) if solution is not None else alike
    return Completion(thought + behind[:kept], thought + tag[:alike])


def thought_of(tokenizer, style: ReasoningFormat, ids: list[int]) -> tuple[list[int], bool]:
    """The tokens before the thought's end, and whether it came to one: an end tag, or the end of the turn.

    What the two end tags begin with alike is taken for the end tag, whatever the student goes on with: there the
    teacher would write its own tag, and a student that has missed its own would be taught never to write it again.
    Alike in their punctuation alone (`</`) they are no sign of an end, as thoughts have such too. A token that holds
    the end of the thought and the beginning of its tag is left out.
    """
    over = [place for place, token in enumerate(ids) if token == tokenizer.eos_token_id]
    ids = ids[: over[0]] if over else ids
    begun = os.path.commonprefix([style.thought_tags[1], style.explanation_tags[1]])
    named = any(map(str.isalnum, begun))
    end = tokenizer.decode(ids).find(begun if named else style.thought_tags[1])
    return (ids, bool(over)) if end < 0 else (ids[: _tokens_within(tokenizer, ids, end)], True)


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
