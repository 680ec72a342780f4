"""The example of a user's own reward: the exact answer, with TRL's reward-function signature.

./launch_mono.sh grpo_exact reward_functions=[rewards.exact.exact_answer]
"""

import re

ANSWER = re.compile(r"Answer:\s*(.+?)\s*$", re.MULTILINE)


def exact_answer(completions: list[str], solution: list[str], **_) -> list[float]:
    """1 where the last `Answer: …` line equals the solution, 0 elsewhere.

    Args:
        completions: texts, or conversations of one assistant message.
        solution: the dataset's column, one per completion.
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    found = [ANSWER.findall(text) for text in texts]
    return [float(bool(f) and f[-1] == s.strip()) for f, s in zip(found, solution, strict=True)]
