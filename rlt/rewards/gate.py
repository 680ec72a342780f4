"""A gate by the teacher's own result: an explanation that arrives at another result than the solution is penalised."""

import re

from rlt.prompts.styles import ReasoningFormat
from rlt.rewards.amounts import is_same_amount, read_amount
from rlt.rewards.verifiers import final_answer
from rlt.schema import ResultGateConfig

NUMBER = re.compile(r"(?:(?<!\d)[-−])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")
BOXED = "\\boxed{"
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


def own_result(explanation: str, style: ReasoningFormat, solution: str) -> str | None:
    """The final result that a text arrives at: in its last box, in the solution's tags or after its last `Answer:`,
    else its last number where the solution is a number (the `flexible-extract` of EleutherAI's evaluation harness for
    GSM8K); None where none of these is there."""
    found = last_boxed(explanation) or final_answer(explanation, style)
    if found is None and NUMBER.fullmatch(solution.strip(" $.")):
        numbers = NUMBER.findall(explanation)
        found = numbers[-1] if numbers else None
    return found


def comes_to(thought: str, solution: str) -> bool:
    """Whether a thought's last sentence states the solution: by its last number where the solution is a number, else as
    it is written."""
    last = SENTENCE.split(thought.strip())[-1]
    wanted = read_amount(solution)
    if wanted is None:
        return re.search(rf"(?<![\w/]){re.escape(solution.strip())}(?![\w/])", last) is not None
    numbers = NUMBER.findall(last)
    found = read_amount(numbers[-1]) if numbers else None
    return found is not None and is_same_amount(found, wanted)


def last_boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{…}`, whose braces may be nested; None without one, or one that is not closed."""
    _, tag, rest = text.rpartition(BOXED)
    depth = 1
    for place, letter in enumerate(rest if tag else ""):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[:place].strip() or None
    return None


def gate_penalty(right: bool | None, config: ResultGateConfig) -> float:
    """Added to the reward: 0 for a right result, `wrong_result_penalty` for a wrong one.

    A sum and not a product: rewards of log-probs are negative, so that 0 would be the best of them. The penalty of a
    missing end tag (arXiv 2506.08388) is added in the same way.

    Args:
        right: None where no result was found; `missing_result` says which it counts as.
    """
    if right is None:
        right = config.missing_result == "right"
    return 0.0 if right else config.wrong_result_penalty
