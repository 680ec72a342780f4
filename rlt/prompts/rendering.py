"""The exact texts that a teacher and a student read, and where the scored parts of them stand.

Each model is shown the text of its own chat template. Positions are character offsets into the rendered text, so that a
span is found without searching for it (`rlt/prompts/spans.py` turns offsets into tokens).
"""

from dataclasses import dataclass

from rlt.prompts.chat import render_chat, render_with_system, without_begun_thought
from rlt.prompts.styles import ReasoningFormat

PROBE = "A"  # a word that could follow a prompt
ANSWER_LINE = "\n\nThink step by step. Then write the final answer alone on the last line, as `Answer: …`."
MARK = "\x02content\x03"  # stands for a text while the chat template is rendered around it


@dataclass(frozen=True)
class Rendered:
    """A text and the half-open character ranges of its parts."""

    text: str
    spans: dict[str, tuple[int, int]]


def render_teacher_prompt(
    tokenizer, style: ReasoningFormat, question: str, solution: str, system_prompt: str | None = None
) -> str:
    """The teacher's prompt: the question, then its own turn, begun with the solution and the explanation's tag."""
    messages = [
        {"role": "system", "content": system_prompt or style.teacher_system},
        {"role": "user", "content": question},
    ]
    start, end = style.solution_tags
    begun = f"{start}{solution}{end}{style.delimiter}{style.explanation_tags[0]}\n\n"
    return without_begun_thought(render_with_system(tokenizer, messages, add_generation_prompt=True)) + begun


def prompt_token_ids(tokenizer, prompts: list[str]) -> list[list[int]]:
    """Token ids of rendered prompts, tokenised as they are when a text follows.

    At the end of a text a tokenizer may merge two newlines that it keeps apart before a word. A completion sampled
    after the merged token would be tokenised otherwise in the whole text, and the reward could not reuse its log-probs.
    """
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer([prompt + PROBE for prompt in prompts], return_offsets_mapping=True, **options)
    ids = []
    for prompt, tokens, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        inside = [token for token, (_, end) in zip(tokens, offsets, strict=True) if end <= len(prompt)]
        whole = len(inside) == len(tokens) - 1
        ids.append(inside if whole else tokenizer(prompt, **options)["input_ids"])
    return ids


def split_completion(style: ReasoningFormat, completion: str) -> tuple[str, bool]:
    """(explanation, closed): the text before the explanation's first end tag, and whether that tag was written."""
    explanation, tag, _ = completion.partition(style.explanation_tags[1])
    return explanation, bool(tag)


def render_teacher_reading(style: ReasoningFormat, teacher_prompt: str, completion: str) -> Rendered:
    """Prompt and completion as the teacher reads them for the reward; a missing end tag is put in.

    The `explanation` span begins right after its start tag, so the two newlines of the prompt belong to it.
    """
    explanation, closed = split_completion(style, completion)
    text = teacher_prompt + (completion if closed else completion + style.explanation_tags[1])
    return Rendered(text, {"explanation": (len(teacher_prompt) - 2, len(teacher_prompt) + len(explanation))})


def render_student_reading(
    tokenizer,
    style: ReasoningFormat,
    question: str,
    solution: str,
    explanation: str,
    system_prompt: str | None = None,
) -> Rendered:
    """The student's conversation with `explanation` as its own thought, then the solution.

    Args:
        explanation: goes between the thought tags as it is, its leading newlines included.

    Returns:
        the text, with the spans `thought` and `solution` (what stands inside the tags).
    """
    thought_start, thought_end = style.thought_tags
    before = thought_start
    between = f"{thought_end}{style.delimiter}{style.solution_tags[0]}"
    after = style.solution_tags[1]
    asked = [
        {"role": "system", "content": system_prompt or style.student_system},
        {"role": "user", "content": question},
    ]
    # What a student is asked and learns to answer. Some templates begin a turn that is written otherwise, with an empty
    # thought for one.
    head = without_begun_thought(render_with_system(tokenizer, asked, add_generation_prompt=True))
    # Rendered around a mark: a template that strips or edits its content must not touch the scored text.
    _, _, tail = render_with_system(tokenizer, [*asked, {"role": "assistant", "content": MARK}]).rpartition(MARK)
    thought_at = len(head) + len(before)
    solution_at = thought_at + len(explanation) + len(between)
    text = head + before + explanation + between + solution + after + tail
    spans = {
        "thought": (thought_at, thought_at + len(explanation)),
        "solution": (solution_at, solution_at + len(solution)),
    }
    return Rendered(text, spans)


def render_conversation(tokenizer, question: str, system_prompt: str | None) -> str:
    """A question, behind a system prompt if there is one; the answer's turn comes next."""
    asked = {"role": "user", "content": question}
    if not system_prompt:
        return render_chat(tokenizer, [asked], add_generation_prompt=True)
    messages = [{"role": "system", "content": system_prompt}, asked]
    return render_with_system(tokenizer, messages, add_generation_prompt=True)


def render_question(
    tokenizer, style: ReasoningFormat, question: str, system_prompt: str | None = None, answer_line: bool = False
) -> str:
    """The conversation in which a student is asked; its own turn comes next.

    Args:
        answer_line: ask for a last line `Answer: …` instead of the format's sections.
    """
    if answer_line:
        return render_conversation(tokenizer, question + ANSWER_LINE, system_prompt)
    return without_begun_thought(render_conversation(tokenizer, question, system_prompt or style.student_system))


def student_answer(style: ReasoningFormat, trace: str, solution: str) -> str:
    """The answer that a student learns: the trace as its own thought, then the solution.

    The trace begins behind two newlines, as an explanation does in the reward's reading.
    """
    thought_start, thought_end = style.thought_tags
    solution_start, solution_end = style.solution_tags
    return (
        f"{thought_start}\n\n{trace.strip()}\n\n{thought_end}{style.delimiter}{solution_start}{solution}{solution_end}"
    )
