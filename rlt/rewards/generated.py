"""The student's own answers behind a part of the explanation: what it can do with it, beside what it finds likely.

The student reads the question and the beginning of the explanation as its own thought; the thought is ended there, and
the student writes the solution. Answering early is a measure of how much a thought carries (arXiv 2307.13702); a point
that is drawn keeps an explanation from giving the result only in its last words.
"""

import torch

from rlt.prompts.styles import ReasoningFormat
from rlt.rewards.gate import own_result
from rlt.rewards.teacher import Reading


def drawn_share(seed: int) -> float:
    """In (0, 1), uniform: how much of an explanation is read."""
    share = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()
    return max(share, torch.finfo(torch.float64).tiny)


def kept_tokens(share: float, count: int) -> int:
    """How many of an explanation's tokens are read: never none of them, nor all where there are two or more."""
    assert 0 < share < 1, share
    return max(1, min(round(share * count), count - 1))


def answer_prompt(tokenizer, style: ReasoningFormat, reading: Reading, kept: int) -> list[int]:
    """The student's text up to its solution, with the first `kept` tokens of the explanation as its whole thought.

    Args:
        tokenizer: the student's.
    """
    thought = reading.explanation.right
    end = tokenizer(f"{style.thought_tags[1]}{style.delimiter}{style.solution_tags[0]}", add_special_tokens=False)
    return reading.student.ids[: thought[kept - 1] + 1] + end["input_ids"]


def answer_in(text: str, style: ReasoningFormat, solution: str) -> str | None:
    """What the student gives inside the solution's tags, of which the first stands in its prompt; None for nothing.

    Of a sentence, such as a student writes that never learned the tags, it is the result in it (`own_result`).
    """
    inside = text.partition(style.solution_tags[1])[0].strip()
    return own_result(inside, style, solution) or inside or None
