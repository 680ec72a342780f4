"""The pure part of the reward, on numbers worked by hand."""

import math

import pytest
import torch

from rlt.rewards.reductions import NORMALIZERS, REDUCTIONS, kl_estimate, weighted_reductions
from rlt.rewards.teacher import kl_part, naturalness, solution_part
from rlt.schema import TeacherRewardConfig

VALUES = torch.tensor([-4.0, -1.0, -2.0, -3.0])
PAPER = TeacherRewardConfig(
    answer_log_prob_coeff=[1, 0.01],
    kl_penalty_reward_coeff=[3, 0.03],
    reduction_log_prob_fn=["mean", "min"],
    reduction_kl_fn=["mean", "max"],
    normalize_log_prob_fn=None,
    normalize_kl_fn=None,
    clip_log_prob=100000,
    clip_kl=100000,
    use_schulman_kl_estimation=False,
    not_matched_penalty=-1.0,
    unbias_teacher_log_probs=True,
    unbias_student_log_probs_temp=0.7,
    include_teacher_think_entropy=True,
    top_share=0.1,
    log_sum_exp_temperature=1.0,
)


def changed(**values) -> TeacherRewardConfig:
    return TeacherRewardConfig(**{**vars(PAPER), **values})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean", -2.5),
        ("sum", -10.0),
        ("min", -4.0),
        ("max", -1.0),
        ("median", -3.0),  # the lower of the two in the middle
        ("first_quartile", -3.25),  # sorted -4 -3 -2 -1, position 0.75
        ("last_quartile", -1.75),  # position 2.25
    ],
)
def test_reductions_of_four_values(name, expected):
    assert REDUCTIONS[name](VALUES).item() == pytest.approx(expected)


def test_normalisers():
    x = torch.tensor([math.log(0.5)])
    assert NORMALIZERS["none"](x).item() == pytest.approx(math.log(0.5))
    assert NORMALIZERS["exp"](x).item() == pytest.approx(0.5)
    assert NORMALIZERS["exp_norm"](x).item() == pytest.approx(1 - 2)


def test_schulman_estimate_is_never_negative_and_zero_where_both_agree():
    teacher, student = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-2.0, -1.0, -2.0])
    assert kl_estimate(teacher, student, schulman=False).tolist() == [1.0, -2.0, 0.0]
    expected = [1 - 1 + math.exp(-1), -2 - 1 + math.exp(2), 0.0]
    assert kl_estimate(teacher, student, schulman=True).tolist() == pytest.approx(expected)


def test_weighted_reductions_sum_coefficients_times_parts():
    total, parts = weighted_reductions(VALUES, ["mean", "min"], [1, 0.01])
    assert parts == {"mean": -2.5, "min": -4.0}
    assert total == pytest.approx(-2.54)


def test_solution_part_clips_each_token_before_reducing():
    total, parts = solution_part(VALUES, changed(clip_log_prob=2.0))
    assert parts == {"answer_log_prob_mean": -1.75, "answer_log_prob_min": -2.0}
    assert total == pytest.approx(-1.77)


def test_kl_part_is_subtracted_and_clipped_from_above():
    teacher, student = torch.tensor([0.0, 0.0]), torch.tensor([-1.0, -5.0])
    term, kl, parts = kl_part(teacher, student, changed(clip_kl=3.0))
    assert parts == {"reasoning_kl_mean": 2.0, "reasoning_kl_max": 3.0}
    assert term == kl == pytest.approx(-(3 * 2.0 + 0.03 * 3.0))


def test_without_the_teachers_entropy_the_students_surprise_is_penalised():
    teacher, student = torch.tensor([-0.5]), torch.tensor([-2.0])
    term, kl, _ = kl_part(teacher, student, changed(include_teacher_think_entropy=False))
    assert term == pytest.approx(-(3 * 2.0 + 0.03 * 2.0))
    assert kl == pytest.approx(-(3 * 1.5 + 0.03 * 1.5))


def test_an_explanation_without_tokens_has_no_kl():
    assert naturalness(torch.zeros(0), PAPER) == (0.0, {"mean": 0.0, "max": 0.0})
