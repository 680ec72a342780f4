"""Paired bootstrap, metrics and the plot."""

import json
import math

import pytest

from generation import request_seed
from rewards.exact import exact_answer
from trainers.evaluation import paired_bootstrap
from trainers.outputs import plot_curves


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


def test_seeds_depend_on_every_part_of_where():
    seeds = {
        request_seed(*where)
        for where in [(1, "train", 0, 0), (2, "train", 0, 0), (1, "eval", 0, 0), (1, "train", 1, 0)]
    }
    assert len(seeds) == 4
    assert request_seed(1, "train", 0, 0) == request_seed(1, "train", 0, 0)


def test_exact_answers():
    texts = ["so\nAnswer: 12", "Answer: 3\nAnswer: 12 ", "12", [{"role": "assistant", "content": "Answer: 12"}]]
    assert exact_answer(texts, ["12"] * 4) == [1.0, 1.0, 0.0, 1.0]


def test_the_plot_is_drawn_from_metrics(tmp_path):
    assert plot_curves(tmp_path) is None
    lines = [{"step": s, "reward": -s, "kl": 0.1, "completions/mean_length": 9, "eval/reward": -s} for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_curves(tmp_path).stat().st_size > 1000
