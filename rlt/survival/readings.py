"""Log-probs for scores, outside of training: read again in smaller passes when they run out of memory."""

from collections.abc import Callable
from typing import Literal

import torch

from rlt.logprobs import LogProbs, token_log_probs
from rlt.survival.oom import TokenBudget, Watch, repeat_smaller

REMEDY = "lower max_prompt_length or max_completion_length, or take a smaller model"
Read = Callable[[object, list[list[int]], list[list[int]], float], list[torch.Tensor]]


Ranked = Callable[[object, list[list[int]], list[list[int]], float], LogProbs]


def lasting_ranked_log_probs(token_budget: int | None, entropy: Literal["none", "rank"] = "rank") -> Ranked:
    """A function of a model, sequences, counted tokens and a temperature, as `token_log_probs` takes them; without
    gradients: log-probs, and the ranks of the same tokens. What its passes may hold is remembered from one call to the
    next.

    Args:
        token_budget: most tokens of one pass, as long as they fit.
    """
    budget = TokenBudget(token_budget, REMEDY)

    @torch.no_grad()
    def read(model, sequences, counted, temperature: float) -> LogProbs:
        def attempt(watch: Watch) -> LogProbs:
            options = {"temperature": temperature, "token_budget": budget.tokens, "guard": watch, "entropy": entropy}
            return token_log_probs(model, sequences, counted, **options)

        values = repeat_smaller(budget, attempt)
        budget.step_done()
        return values

    return read


def lasting_log_probs(token_budget: int | None) -> Read:
    """The same, of log-probs alone."""
    both = lasting_ranked_log_probs(token_budget, "none")

    def read(model, sequences, counted, temperature: float) -> list[torch.Tensor]:
        return both(model, sequences, counted, temperature)[0]

    return read
