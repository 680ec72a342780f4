"""How well a text suits a student before it has learned from it, from one pass of the student.

T tokens of the text.
"""

import math

import torch

MOST_RANK = 100  # larger ranks count as this one, as in the paper
LEAST_SURPRISAL = 1e-12  # of a text that the student is certain of


def rank_surprisal_ratio(log_probs_T: torch.Tensor, ranks_T: torch.Tensor) -> float:
    """Mean rank over mean surprisal; lower is better: tokens that are unlikely, and yet among the likeliest.

    Source: arXiv 2601.14249, RSR = sum min(rank, 100) / sum -log p, where the likeliest token has rank 1.

    Args:
        log_probs_T: in nats, at temperature 1 as in the paper.
        ranks_T: of the same tokens among the whole vocabulary.

    Returns:
        NaN of a text without tokens.
    """
    if not log_probs_T.numel():
        return math.nan
    return ranks_T.clamp(max=MOST_RANK).sum().item() / max(-log_probs_T.sum().item(), LEAST_SURPRISAL)


def likelihood(log_probs_T: torch.Tensor) -> float:
    """Mean log-prob of a token in nats; NaN of a text without tokens."""
    return log_probs_T.mean().item() if log_probs_T.numel() else math.nan
