"""Means, pass@k and their bootstrap intervals; a question counts once, however many answers it has.

N questions, n answers of each.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import comb, isfinite

import numpy as np

RESAMPLES = 10_000
DRAWS_AT_ONCE = 2**20  # 16 MiB: an index and a value each


@dataclass(frozen=True)
class Estimate:
    """A mean over questions with its 95 % bootstrap interval (percentile method)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def signed(self) -> str:
        """As a difference."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def finite_mean(values: Iterable[float]) -> float:
    """Mean of what is finite; NaN where nothing is."""
    finite = [value for value in values if isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def best_median_worst(rewards: list[float]) -> list[int]:
    """Their places among the finite rewards, each once; fewer when there are fewer."""
    order = sorted((i for i, reward in enumerate(rewards) if isfinite(reward)), key=lambda i: -rewards[i])
    return list(dict.fromkeys([order[0], order[len(order) // 2], order[-1]])) if order else []


def pass_at_k(right: int, n: int, k: int) -> float:
    """Chance that one of k answers is right, unbiased from n of them (arXiv 2107.03374, eq. 1).

    Raises:
        ValueError: k is larger than n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be had from {n} answers of a question")
    return 1.0 - comb(n - right, k) / comb(n, k)


def bootstrap(values_N, seed: int = 0) -> Estimate:
    """The mean of one value per question, resampling questions with replacement; NaN are left out."""
    values_N = np.asarray(values_N, dtype=float)
    values_N = values_N[np.isfinite(values_N)]
    if not values_N.size:
        return Estimate(float("nan"), float("nan"), float("nan"))
    low, high = np.percentile(resampled_means(values_N, np.random.default_rng(seed)), [2.5, 97.5])
    return Estimate(float(values_N.mean()), float(low), float(high))


def resampled_means(values_N: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(RESAMPLES,) means of N draws with replacement, drawn in parts: the stream of one draw, in little memory."""
    rows = max(1, DRAWS_AT_ONCE // values_N.size)
    sizes = [(min(rows, RESAMPLES - done), values_N.size) for done in range(0, RESAMPLES, rows)]
    return np.concatenate([values_N[generator.integers(0, values_N.size, size)].mean(axis=1) for size in sizes])


def paired_bootstrap(before: list[float], after: list[float]) -> Estimate:
    """Mean of after - before over questions in the same order; NaN pairs are left out."""
    return bootstrap(np.asarray(after) - np.asarray(before))


def paired_difference(before: dict[str, float], after: dict[str, float], seed: int = 0) -> Estimate:
    """Mean of after - before over the questions that both answered, by question.

    Raises:
        ValueError: they share no question.
    """
    shared = sorted(before.keys() & after.keys())
    if not shared:
        raise ValueError("the two evaluations share no question")
    return bootstrap([after[question] - before[question] for question in shared], seed)
