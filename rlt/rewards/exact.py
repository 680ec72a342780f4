"""The example of a user's own reward: the right number, with TRL's reward-function signature.

./launch_mono.sh grpo_exact reward_functions=[rlt.rewards.exact.exact_answer]
"""

import re

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def exact_answer(completions: list[str], solution: list[str], **_) -> list[float]:
    """1 where the last number of a text is that of the solution, 0 elsewhere.

    Args:
        completions: texts, or conversations of one assistant message.
        solution: the dataset's column, one per completion.
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    pairs = zip(map(_last_number, texts), map(_last_number, solution), strict=True)
    return [float(found is not None and found == wanted) for found, wanted in pairs]


def _last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1]) if found else None
