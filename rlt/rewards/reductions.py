"""Normalisers, clips and reductions over the tokens of a span (Reinforcement-Learned Teachers, arXiv 2506.08388).

T tokens of one span. Everything is a pure function of tensors.
"""

from collections.abc import Callable

import torch

REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda values_T: values_T.mean(),
    "sum": lambda values_T: values_T.sum(),
    "min": lambda values_T: values_T.min(),
    "max": lambda values_T: values_T.max(),
    "median": lambda values_T: values_T.median(),  # the lower of two, as torch has it
    "first_quartile": lambda values_T: values_T.quantile(0.25),
    "last_quartile": lambda values_T: values_T.quantile(0.75),
}
NORMALIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda values_T: values_T,
    "exp": torch.exp,
    "exp_norm": lambda values_T: 1 - torch.exp(-values_T),
}


def kl_estimate(teacher_T: torch.Tensor, student_T: torch.Tensor, schulman: bool) -> torch.Tensor:
    """k = log p_teacher - log p_student of each sampled token, or Schulman's k - 1 + exp(-k), which is never negative.

    Source: http://joschu.net/blog/kl-approx.html (estimators k1 and k3).
    """
    k_T = teacher_T - student_T
    return k_T - 1 + torch.exp(-k_T) if schulman else k_T


def weighted_reductions(values_T: torch.Tensor, names: list[str], coefficients: list[float]) -> tuple[float, dict]:
    """Sum of coefficient times reduction, and each reduction by name.

    Args:
        values_T: at least one token.

    Returns:
        the sum, and {name: value}.
    """
    assert values_T.numel(), "a span without tokens has no reduction; the caller decides what it is worth"
    parts = {name: REDUCTIONS[name](values_T).item() for name in names}
    return sum(c * parts[name] for c, name in zip(coefficients, names, strict=True)), parts
