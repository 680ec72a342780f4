"""Log-probs of tokens under a model, packed so that what sequences begin with is computed once."""

from rlt.logprobs.engine import LogProbs, pass_members, token_log_probs

__all__ = ["LogProbs", "pass_members", "token_log_probs"]
