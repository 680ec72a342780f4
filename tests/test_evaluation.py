"""Paired bootstrap, seeds and the exact reward."""

import math
import tracemalloc

import numpy as np
import pytest

from rlt.estimates import DRAWS_AT_ONCE, RESAMPLES, bootstrap, paired_bootstrap
from rlt.generation.seeds import request_seed
from rlt.rewards.exact import exact_answer


def test_a_constant_gain_has_an_interval_of_no_width():
    gain = paired_bootstrap([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.5, 0.5, 0.5))


def test_noise_around_zero_gives_an_interval_around_zero():
    gain = paired_bootstrap([0.0] * 40, [(-1.0) ** i for i in range(40)])
    assert gain.mean == 0
    assert gain.low < 0 < gain.high
    # The standard error is 1 / sqrt(40); 1.96 of it, to the bootstrap's own noise.
    assert gain.high == pytest.approx(1.96 / math.sqrt(40), rel=0.1)


def test_questions_without_a_score_are_left_out():
    assert paired_bootstrap([0.0, float("nan"), 0.0], [1.0, 5.0, 1.0]).mean == 1.0
    assert math.isnan(paired_bootstrap([float("nan")], [1.0]).mean)


@pytest.mark.parametrize("count", [1, 3, 104, 105, 160, 333])
def test_resamples_in_parts_are_those_of_one_draw(count):
    values_N = np.random.default_rng(1).normal(size=count)
    whole = np.random.default_rng(7).integers(0, count, size=(RESAMPLES, count))
    low, high = np.percentile(values_N[whole].mean(axis=1), [2.5, 97.5])
    found = bootstrap(values_N, seed=7)
    assert (found.mean, found.low, found.high) == (values_N.mean(), low, high)


def test_a_bootstrap_of_many_questions_needs_no_more_memory():
    tracemalloc.start()
    bootstrap(np.arange(2000.0))  # of one draw: 16 bytes x 10,000 x 2,000 = 320 MB
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * 16 * DRAWS_AT_ONCE


def test_seeds_depend_on_every_part_of_where():
    seeds = {
        request_seed(*where)
        for where in [(1, "train", 0, 0), (2, "train", 0, 0), (1, "eval", 0, 0), (1, "train", 1, 0)]
    }
    assert len(seeds) == 4
    assert request_seed(1, "train", 0, 0) == request_seed(1, "train", 0, 0)


def test_exact_answers():
    texts = ["3 + 9 = 12.", "12 or 13", "twelve", [{"role": "assistant", "content": "It is 12.0"}], "-12"]
    assert exact_answer(texts, ["12"] * 5) == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert exact_answer(["no number"], ["none"]) == [0.0]
