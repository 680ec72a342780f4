"""Ranks of tokens, and the rank-surprisal ratio: against one row at a time, and on numbers worked by hand."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import build
from test_reductions import PAPER

from rlt.logprobs import token_log_probs
from rlt.logprobs.head import ranks_of
from rlt.models.loading import load_frozen
from rlt.prompts.styles import load_format
from rlt.rewards import TeacherReward
from rlt.rewards.suitability import likelihood, rank_surprisal_ratio
from rlt.survival.readings import lasting_log_probs, lasting_ranked_log_probs

ROW = {"question": "What is 3 * 4?", "solution": "12"}
TEXTS = ["Three fours are 12.<|end_of_explanation|>", "It is 12, as 4 + 4 + 4 is.<|end_of_explanation|>", ""]


def test_ratio_by_hand():
    log_probs, ranks = torch.tensor([-1.0, -3.0, -4.0]), torch.tensor([1.0, 7.0, 5000.0])
    assert rank_surprisal_ratio(log_probs, ranks) == pytest.approx((1 + 7 + 100) / 8)  # 5000 counts as 100
    assert likelihood(log_probs) == pytest.approx(-8 / 3)


def test_a_certain_text_has_a_high_ratio_and_an_empty_one_has_none():
    assert rank_surprisal_ratio(torch.zeros(2), torch.ones(2)) == pytest.approx(2e12)
    assert math.isnan(rank_surprisal_ratio(torch.zeros(0), torch.zeros(0)))
    assert math.isnan(likelihood(torch.zeros(0)))


def test_ranks_count_what_is_likelier_and_ties_share_the_better_rank():
    values = torch.tensor([[0.1, 0.5, 0.5, 0.9], [0.1, 0.2, 0.3, 0.4]])
    assert ranks_of(values, torch.tensor([1, 0])).tolist() == [2, 4]


@pytest.mark.parametrize("attention", ["shared_prefix", "sdpa"])
def test_ranks_are_those_of_one_row_at_a_time_and_log_probs_keep_every_digit(tiny_student, attention):
    model = load_frozen(tiny_student, torch.float64, attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    begun = torch.randint(1000, 2000, (9,), generator=generator).tolist()
    sequences = [begun + torch.randint(1000, 2000, (n,), generator=generator).tolist() for n in (5, 12, 1)]
    counted = [list(range(7, len(ids))) for ids in sequences]
    with torch.no_grad():
        plain, _ = token_log_probs(model, sequences, counted, temperature=0.7, token_budget=64)
        log_probs, ranks = token_log_probs(model, sequences, counted, temperature=0.7, token_budget=64, entropy="rank")
        for row, (ids, where) in enumerate(zip(sequences, counted, strict=True)):
            logits = model(torch.tensor([ids])).logits[0].double()
            expected = [int((logits[i - 1] > logits[i - 1, ids[i]]).sum()) + 1 for i in where]
            assert ranks[row].tolist() == expected
            assert torch.equal(log_probs[row], plain[row])


def of(tokenizer, student, ranked: bool, config=PAPER) -> TeacherReward:
    model = load_frozen(student, torch.float32)
    plain, both = lasting_log_probs(512), lasting_ranked_log_probs(512)

    def log_probs(sequences, counted, temperature):
        return plain(model, sequences, counted, temperature)

    def and_ranks(sequences, counted, temperature):
        return both(model, sequences, counted, temperature)

    asked = and_ranks if ranked else None
    return TeacherReward(tokenizer, load_format("stratos"), config, 0.7, log_probs, log_probs, None, asked)


def test_the_figures_are_of_the_explanation_and_the_reward_keeps_every_digit(tokenizer, tiny_student):
    with_ranks = of(tokenizer, tiny_student, True).score([ROW] * 3, TEXTS)
    without = of(tokenizer, tiny_student, False).score([ROW] * 3, TEXTS)
    plain = of(tokenizer, tiny_student, False, replace(PAPER, unbias_student_log_probs_temp=1.0)).score(
        [ROW] * 3, TEXTS
    )
    assert plain[0].reward != without[0].reward  # PAPER's student is read at 0.7, the figures at 1
    for one, other, at_1 in zip(with_ranks, without, plain, strict=True):
        figures = {name: one.parts[name] for name in ("rsr", "likelihood")}
        assert replace(one, parts={k: v for k, v in one.parts.items() if k not in figures}).as_dict() == other.as_dict()
        thought = at_1.log_probs[0][: len(one.log_probs[1])]
        assert figures["likelihood"] == pytest.approx(thought.mean().item(), nan_ok=True)
    # A random model of 49,152 tokens ranks nearly every token above 100.
    assert with_ranks[0].parts["rsr"] == pytest.approx(-100 / with_ranks[0].parts["likelihood"], rel=0.3)
    assert math.isnan(with_ranks[2].parts["rsr"])


@pytest.mark.parametrize("student", [pytest.param("its own", marks=pytest.mark.slow), "the reference"])
def test_training_logs_the_ratio_and_trains_as_without(tiny_run, tmp_path, student):
    found = {}
    for asked in ("true", "false"):
        folder, more = tmp_path / asked, ["student_model=null"] if student == "the reference" else []
        short = ["max_steps=1", "eval_size=0", "eval_steps=null"]
        trainer, _ = build(tiny_run, folder, *more, *short, f"report_rsr={asked}")
        trainer.train()
        found[asked] = next(record for record in trainer.state.log_history if "reward" in record)
    assert found["true"]["reward_parts/rsr"] > 0 and "reward_parts/rsr" not in found["false"]
    assert found["true"]["reward"] == pytest.approx(found["false"]["reward"], abs=1e-5)
