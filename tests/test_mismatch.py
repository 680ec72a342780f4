"""Engine against trainer: what a correction makes of importance ratios, by hand, and the alarm."""

import math

import pytest
import torch
from conftest import build

from trainers.mismatch import MismatchAlarm, importance_figures

HALF, TWICE, TENFOLD = math.log(0.5), math.log(2), math.log(10)


def batch(weights) -> dict[str, torch.Tensor]:
    """Two completions, of two tokens and one."""
    log_ratios = torch.tensor([[HALF, TWICE], [TENFOLD, math.nan]])
    return {
        "old_per_token_logps": log_ratios,
        "sampling_per_token_logps": torch.zeros(2, 2),
        "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "importance_sampling_ratio": torch.tensor(weights),
    }


def alone(sums: torch.Tensor) -> torch.Tensor:
    return sums


def test_ratios_of_tokens_by_hand():
    found = importance_figures(batch([[0.5, 2.0], [3.0, 9.9]]), "token_truncate", (None, 3.0), alone)
    assert found["outside"] == pytest.approx(1 / 3)
    assert found["effective_sample_size"] == pytest.approx(5.5**2 / (3 * (0.25 + 4 + 9)))


def test_ratios_of_completions_by_hand():
    found = importance_figures(batch([[1.0], [0.0]]), "sequence_mask", (None, 3.0), alone)
    assert found == {"outside": pytest.approx(1 / 2), "effective_sample_size": pytest.approx(1 / 2)}


def test_sums_are_those_of_all_ranks():
    both = importance_figures(batch([[1.0], [0.0]]), "sequence_mask", (0.9, 3.0), lambda sums: torch.cat([sums, sums]))
    assert both == {"outside": pytest.approx(1 / 2), "effective_sample_size": pytest.approx(1 / 2)}


def test_where_every_weight_was_dropped_no_sample_is_left():
    found = importance_figures(batch([[0.0], [0.0]]), "sequence_mask", (None, 0.1), alone)
    assert found == {"outside": 1.0, "effective_sample_size": 0.0}


@pytest.mark.parametrize(
    ("gaps", "warned"),
    [
        ([0.02, 0.025, 0.017], False),
        ([0.02, 0.03, 0.107], True),  # an engine whose weights are ten steps old
        ([0.26], True),
        ([1e-6, 9e-4], False),  # a few tokens in float32
        ([1e-4, 2e-3], True),
        ([0.2, 0.26], True),
    ],
)
def test_the_alarm_knows_the_first_step(gaps, warned, caplog):
    alarm = MismatchAlarm()
    for gap in gaps:
        alarm.check([gap])
    assert ("engine and trainer differ" in caplog.text) == warned


@pytest.mark.parametrize(
    ("rounds", "gap", "warned"),
    [
        (True, 0.025, False),
        (True, 0.107, True),  # the engine of a continued run, with the weights of ten steps before
        (False, 9e-4, False),  # a few tokens in float32
        (False, 0.025, True),
        (False, 0.107, True),
    ],
)
def test_a_first_step_that_no_rounding_explains_is_said(rounds, gap, warned, caplog):
    alarm = MismatchAlarm(rounds)
    alarm.check([gap])
    assert ("engine and trainer differ" in caplog.text) == warned


def test_a_first_step_that_was_wrong_is_not_what_later_ones_are_measured_by(caplog):
    alarm = MismatchAlarm()
    alarm.check([0.107])
    caplog.clear()
    alarm.check([0.17])
    assert not caplog.text
    alarm.check([0.19])  # more than three times 0.06
    assert "(at first 0.1070, alarm above 0.1800)" in caplog.text


@pytest.mark.parametrize(("dtype", "bound"), [("bf16=false", 3e-3), ("bf16=true", 0.06)])
def test_a_trainer_expects_the_gap_of_its_dtype(tiny_run, tmp_path, in_root, dtype, bound):
    trainer, _ = build(tiny_run, tmp_path, dtype, "eval_size=0")
    assert trainer._mismatch.greatest_first == pytest.approx(bound)


def test_nothing_measured_is_no_first_step(caplog):
    alarm = MismatchAlarm()
    for gaps in ((), [0.02], [0.02]):
        alarm.check(gaps)
    assert alarm.first == 0.02 and not caplog.text
