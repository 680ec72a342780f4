"""What may be chosen beside the paper's reward, on numbers worked by hand, and each run of it composed and built."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import build, config_of
from test_reductions import PAPER

from rlt.errors import Refused
from rlt.planning.configuration import REWARDS, options, rewrite_arguments
from rlt.planning.plan import make_plan
from rlt.rewards.permuted import permuted_within_groups
from rlt.rewards.reductions import log_sum_exp, top_share
from rlt.rewards.teacher import kl_part

KL = torch.tensor([0.0, 4.0, 1.0, 3.0, 2.0])
TEACHERS = [name for name in options(REWARDS) if name != "verifier"]


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.2, 4.0), (0.21, 3.5), (0.4, 3.5), (0.5, 3.0), (1.0, 2.0), (1e-6, 4.0)],  # one, two, two, three, five, one
)
def test_top_share_is_the_mean_of_the_largest_values_rounded_up(share, expected):
    assert top_share(KL, share).item() == pytest.approx(expected)


def test_a_share_that_floats_round_up_takes_no_value_more():
    values = torch.arange(100.0)
    assert 0.07 * 100 > 7
    assert top_share(values, 0.07).item() == pytest.approx(96.0)  # 93 to 99


def test_log_sum_exp_lies_between_the_mean_and_the_maximum():
    two = torch.tensor([0.0, math.log(3.0)])
    assert log_sum_exp(two, 1.0).item() == pytest.approx(math.log(2.0))  # log of (1 + 3) / 2
    assert log_sum_exp(two, 0.5).item() == pytest.approx(0.5 * math.log(5.0))  # half the log of (1 + 9) / 2
    assert log_sum_exp(KL, 1e-3).item() == pytest.approx(4.0, abs=2e-3)
    assert log_sum_exp(KL.double(), 1e4).item() == pytest.approx(2.0, abs=1e-3)
    assert log_sum_exp(torch.full((3,), 7.0), 0.3).item() == pytest.approx(7.0)


def test_the_spikes_stand_in_the_place_of_the_maximum():
    config = replace(PAPER, reduction_kl_fn=["mean", "top_share"], kl_penalty_reward_coeff=[3, 0.3], top_share=0.4)
    term, kl, parts = kl_part(KL, torch.zeros(5), config)
    assert term == kl == pytest.approx(-(3 * 2.0 + 0.3 * 3.5))
    assert parts == pytest.approx({"reasoning_kl_mean": 2.0, "reasoning_kl_top_share": 3.5})


def test_a_group_keeps_its_rewards_and_other_groups_have_none_of_them():
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0])
    permuted = permuted_within_groups(rewards, 4, seed=0)
    assert sorted(permuted[:4].tolist()) == [1, 2, 3, 4] and sorted(permuted[4:].tolist()) == [10, 20, 30, 40]
    assert rewards.tolist() == [1, 2, 3, 4, 10, 20, 30, 40]
    assert torch.equal(permuted, permuted_within_groups(rewards, 4, seed=0))
    drawn = {tuple(permuted_within_groups(rewards, 4, seed)[:4].tolist()) for seed in range(300)}
    assert len(drawn) == 24


def test_what_could_not_be_scored_stays_where_it_is():
    rewards = torch.tensor([1.0, math.nan, 3.0, math.nan])
    for seed in range(5):
        permuted = permuted_within_groups(rewards, 4, seed)
        assert permuted.isnan().tolist() == [False, True, False, True] and sorted(permuted[[0, 2]].tolist()) == [1, 3]


@pytest.mark.parametrize("reward", TEACHERS)
@pytest.mark.parametrize("run", ["teacher_rlt_tiny", "collect_tiny"])
def test_every_reward_is_planned_by_its_name(run, reward):
    if (run, reward) != ("collect_tiny", "random"):
        make_plan(config_of(run, f"reward_cfg={reward}", "dry_run=true"))


def test_rewards_are_laid_over_each_other_in_a_list():
    plan = make_plan(config_of("trainer_cfg=teacher_grpo_verifier", "reward_cfg=[spike,verifier]", "dry_run=true"))
    assert plan.settings.reduction_kl_fn == ["mean", "top_share"] and plan.settings.verified.length_weight == 0.1
    both = make_plan(config_of("reward_cfg=[gated,generated]", "dry_run=true")).settings
    assert both.gate.wrong_result_penalty == -1.0 and both.generated.answers_per_explanation == 4


def test_a_job_of_a_sweep_reads_what_the_sweep_hands_on():
    given = ["run_cfg=teacher_rlt_tiny", "reward_cfg=spike"]
    assert rewrite_arguments(rewrite_arguments(given)) == rewrite_arguments(given)
    assert rewrite_arguments(["-m", "reward_cfg=spike,random"]) == ["-m", f"{REWARDS}@reward_cfg=spike,random"]


BAD = [
    (["reward_cfg=spikes"], "reward_cfg=spikes: use one of gated, generated"),
    (["run_cfg=evaluate_tiny", "reward_cfg=spike"], "evaluate runs have no reward to choose"),
    (["reward_cfg=spike", "top_share=0"], "top_share=0 must be above 0 and at most 1"),
    (["log_sum_exp_temperature=0"], "log_sum_exp_temperature=0 must be above 0"),
    (["reward_cfg=generated", "answers_cut=0"], "answers_cut=0 must be above 0 and below 1, or null"),
    (["reward_cfg=generated", "answers_cut=1"], "answers_cut=1 must be above 0 and below 1, or null"),
    (["answers_cut=0.5"], "answers_cut is of the student's answers: set reward_cfg=generated"),
    (["missing_result=right"], "missing_result is of the gate: set reward_cfg=gated"),
    (["reward_cfg=gated", "missing_result=maybe"], "missing_result=maybe: use right or wrong"),
    (["reward_cfg=gated", "wrong_result_penalty=1"], "wrong_result_penalty=1 must be 0 or less"),
    (["reward_cfg=gated", "verifier=guess"], "verifier=guess: use one of auto"),
    (["run_cfg=collect_tiny", "reward_cfg=random"], "permute_rewards=true: it is for training; set select=random"),
]


@pytest.mark.parametrize(("overrides", "said"), BAD)
def test_what_cannot_work_is_refused_in_one_line(overrides, said):
    with pytest.raises(Refused, match=said.replace("(", r"\(")) as refused:
        make_plan(config_of(*overrides, "dry_run=true"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("reward", ["spike", "[gated,solution_only]", pytest.param("kl_only", marks=pytest.mark.slow)])
def test_every_reward_is_built_and_makes_a_step(tiny_run, tmp_path, reward):
    trainer, _ = build(tiny_run, tmp_path, f"reward_cfg={reward}", "max_steps=1", "eval_size=0", "eval_steps=null")
    trainer.train()
    (logged,) = [record for record in trainer.state.log_history if "reward" in record]
    assert math.isfinite(logged["reward"])
