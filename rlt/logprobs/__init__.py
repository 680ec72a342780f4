"""Log-probs of tokens under a model, packed so that what sequences begin with is computed once."""

from rlt.logprobs.divergence import Divergence, TeacherHead
from rlt.logprobs.engine import (
    LogProbs,
    best_next_tokens,
    pass_members,
    token_divergences,
    token_hidden_states,
    token_log_probs,
)

__all__ = [
    "Divergence",
    "LogProbs",
    "TeacherHead",
    "best_next_tokens",
    "pass_members",
    "token_divergences",
    "token_hidden_states",
    "token_log_probs",
]
