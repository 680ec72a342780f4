"""Log-probs of tokens under a model, packed so that what sequences begin with is computed once."""

from rlt.logprobs.engine import LogProbs, best_next_tokens, pass_members, token_log_probs

__all__ = ["LogProbs", "best_next_tokens", "pass_members", "token_log_probs"]
