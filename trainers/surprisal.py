"""Weights of a token's loss by how surprising the token is to the model that learns it.

N tokens that carry loss.
"""

import torch


def surprisal_weights(log_probs_N: torch.Tensor, max_surprisal: float, surprising_weight: float) -> torch.Tensor:
    """(N,) 1 for tokens of at most `max_surprisal` nats, `surprising_weight` for the others; without gradients.

    What a model finds very unlikely moves its weights most and is mostly another way to say the same, so that masking
    it keeps what the model could do before: arXiv 2501.14315 (masked beyond a perplexity of 2.5, which is 0.92 nats,
    under the model before training) and 2601.09195 (masked below a probability). Here the model as it is at the step
    is asked, whose pass is made anyway: what it has come to expect counts from then on.
    """
    beyond_N = -log_probs_N.detach() > max_surprisal
    return torch.where(beyond_N, surprising_weight, 1.0).to(log_probs_N.dtype)
