"""Means, paired differences and effect sizes over seeds, and correlations over sets of explanations."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan, sqrt

import numpy as np
from scipy import stats

from rlt.estimates import RESAMPLES, Estimate

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Of two arms over the seeds that both have.

    Args:
        estimate: mean with its t-interval.
        effect: mean over the standard deviation of the differences (Cohen's d of paired values).
        seeds: how many.
    """

    estimate: Estimate
    effect: float
    seeds: int


def t_interval(values_N: Sequence[float]) -> Estimate:
    """The mean of N seeds with Student's 95 % interval of N - 1 degrees of freedom; of one seed there is none."""
    found_N = np.asarray(values_N, dtype=float)
    mean = float(found_N.mean()) if found_N.size else nan
    if found_N.size < 2:
        return Estimate(mean, nan, nan)
    half = float(stats.t.ppf((1 + LEVEL) / 2, found_N.size - 1) * found_N.std(ddof=1) / sqrt(found_N.size))
    return Estimate(mean, mean - half, mean + half)


def paired(before: dict[int, float], after: dict[int, float]) -> Difference:
    """after - before, by seed."""
    seeds = sorted(before.keys() & after.keys())
    differences_N = np.array([after[seed] - before[seed] for seed in seeds])
    spread = float(differences_N.std(ddof=1)) if len(seeds) > 1 else nan
    estimate = t_interval(list(differences_N))
    return Difference(estimate, estimate.mean / spread if spread else nan, len(seeds))


def correlation(x_N: Sequence[float], y_N: Sequence[float], seeds_N: Sequence[int]) -> Estimate:
    """Pearson's, with the percentile bootstrap's interval over seeds: sets of one seed share questions and models."""
    x_N, y_N, seeds_N = np.asarray(x_N, dtype=float), np.asarray(y_N, dtype=float), np.asarray(seeds_N)
    of_seed = [np.flatnonzero(seeds_N == seed) for seed in np.unique(seeds_N)]
    draws = np.random.default_rng(0).integers(0, len(of_seed), size=(RESAMPLES, len(of_seed)))
    picked = [np.concatenate([of_seed[place] for place in draw]) for draw in draws]
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw of equal values has none
        resampled = [np.corrcoef(x_N[some], y_N[some])[0, 1] for some in picked]
        low, high = np.nanpercentile(resampled, [2.5, 97.5])
        return Estimate(float(np.corrcoef(x_N, y_N)[0, 1]), float(low), float(high))
