"""Verifiable rewards of plain GRPO: a right answer, the format, and an answer that is not too long.

Each is a reward function of TRL's signature; `reward_weights` mixes them, with a teacher's reward too.
"""

from collections.abc import Callable

from rlt.prompts.styles import ReasoningFormat
from rlt.rewards.verifiers import DDP_TIMEOUT_S, Verifier, final_answer
from rlt.schema import VerifiedRewardConfig

RewardFunction = Callable[..., list[float]]


def verified_rewards(
    config: VerifiedRewardConfig, style: ReasoningFormat, ddp_timeout: float = DDP_TIMEOUT_S
) -> tuple[list[RewardFunction], list[float]]:
    """Functions and their weights; those of weight 0 are left out.

    Args:
        ddp_timeout: seconds that other ranks wait for this one.
    """
    verifier = Verifier(config.verifier, config.verifier_limit_s, ddp_timeout)

    def answer_reward(completions: list[str], log_metric, **columns) -> list[float]:
        """1 for a right answer."""
        keys = [key for key in ("question", "solution", "task", "metadata") if key in columns]
        rows = [dict(zip(keys, values, strict=True)) for values in zip(*(columns[k] for k in keys), strict=True)]
        before = verifier.failures
        found = verifier.check_batch([final_answer(text, style) for text in completions], rows)
        log_metric("verifier/failures", float(verifier.failures - before))
        return found

    def format_reward(completions: list[str], **_) -> list[float]:
        """1 where an answer is given in a way that can be found."""
        return [float(final_answer(text, style) is not None) for text in completions]

    def length_penalty(completion_ids: list[list[int]], **_) -> list[float]:
        """0 up to `length_free` tokens, from there linearly to -1 at twice as many."""
        return [-min(1.0, max(0.0, len(ids) / config.length_free - 1.0)) for ids in completion_ids]

    weights = (config.answer_weight, config.format_weight, config.length_weight)
    weighted = zip((answer_reward, format_reward, length_penalty), weights, strict=True)
    chosen = [(function, weight) for function, weight in weighted if weight]
    return [function for function, _ in chosen], [float(weight) for _, weight in chosen]
