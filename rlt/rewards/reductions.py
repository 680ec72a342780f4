"""Normalisers, clips and reductions over the tokens of a span (Reinforcement-Learned Teachers, arXiv 2506.08388).

T tokens of one span. Everything is a pure function of tensors.
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from rlt.schema import TeacherRewardConfig

REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda values_T: values_T.mean(),
    "sum": lambda values_T: values_T.sum(),
    "min": lambda values_T: values_T.min(),
    "max": lambda values_T: values_T.max(),
    "median": lambda values_T: values_T.median(),  # the lower of two, as torch has it
    "first_quartile": lambda values_T: values_T.quantile(0.25),
    "last_quartile": lambda values_T: values_T.quantile(0.75),
}


def top_share(values_T: torch.Tensor, share: float) -> torch.Tensor:
    """Mean of the largest values: of `share` of T, rounded up, so of one at least. 1 / T: the maximum; 1: the mean.

    A maximum is the share 1 / T of a text that grows with T; a fixed share stays comparable between lengths. Source:
    expected shortfall (conditional value at risk) at level 1 - share, Rockafellar and Uryasev, 2000.
    """
    count = max(1, math.ceil(round(share * len(values_T), 6)))  # by floats 0.07 of 100 is 7.000000000000001
    return values_T.topk(count).values.mean()


def log_sum_exp(values_T: torch.Tensor, temperature: float) -> torch.Tensor:
    """t log mean exp(values / t): the maximum as t goes to 0, the mean as t grows (the exponential mean)."""
    return temperature * ((values_T / temperature).logsumexp(0) - math.log(len(values_T)))


def reductions_of(config: TeacherRewardConfig) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """All reductions by name, those with a key at its value."""
    return {
        **REDUCTIONS,
        "top_share": partial(top_share, share=config.top_share),
        "log_sum_exp": partial(log_sum_exp, temperature=config.log_sum_exp_temperature),
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


def weighted_reductions(
    values_T: torch.Tensor,
    names: list[str],
    coefficients: list[float],
    reductions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = REDUCTIONS,
) -> tuple[float, dict]:
    """Sum of coefficient times reduction, and each reduction by name.

    Args:
        values_T: at least one token.
        reductions: by name.

    Returns:
        the sum, and {name: value}.
    """
    assert values_T.numel(), "a span without tokens has no reduction; the caller decides what it is worth"
    parts = {name: reductions[name](values_T).item() for name in names}
    return sum(c * parts[name] for c, name in zip(coefficients, names, strict=True)), parts
