"""Repeating in smaller passes, without any trainer: what is halved, when it grows again, and where it ends."""

import pytest
import torch
from conftest import ROOT
from test_logprobs import llama

from rlt.errors import Refused
from rlt.logprobs import engine, token_log_probs
from rlt.survival.oom import (
    PATIENCE,
    NoMemoryLeft,
    RanOut,
    Shortage,
    TokenBudget,
    Watch,
    is_out_of_memory,
    repeat_smaller,
)
from rlt.survival.readings import lasting_log_probs

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: 8 bytes"),
]


def fitting(limit: int, sizes: list[int], budget: TokenBudget, asked: list):
    """An attempt whose passes are as large as the budget lets them be, and whose memory holds `limit` tokens."""

    def attempt(watch: Watch) -> int:
        tokens = min(budget.tokens or max(sizes), sum(sizes))
        alone = tokens < 2 * min(sizes)
        watch.plan([(min(sizes), 1) if alone else (tokens, 2)])
        asked.append(tokens)
        if tokens > limit:
            raise ERRORS[0]
        return tokens

    return attempt


@pytest.mark.parametrize("error", ERRORS)
def test_running_out_of_memory_is_recognised(error):
    assert is_out_of_memory(error)


def test_other_errors_are_not_taken_for_it():
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        repeat_smaller(TokenBudget(8, ""), lambda watch: (_ for _ in ()).throw(RuntimeError("illegal")))


def test_passes_are_halved_until_they_fit_from_the_start():
    budget, asked, begun = TokenBudget(1000, "rent more"), [], []
    attempt = fitting(130, [100] * 10, budget, asked)
    assert repeat_smaller(budget, attempt, lambda: begun.append(len(asked))) == 125
    assert asked == [1000, 500, 250, 125]
    assert begun == [1, 2, 3]
    assert (budget.tokens, budget.recovered) == (125, 3)


def test_more_is_tried_again_after_clean_steps_and_later_each_time():
    budget, asked = TokenBudget(1000, ""), []
    attempt = fitting(700, [100] * 10, budget, asked)
    for waited in (PATIENCE, 2 * PATIENCE):
        repeat_smaller(budget, attempt)
        assert budget.tokens == 500
        for _ in range(waited - 1):
            budget.step_done()
        assert budget.lowered
        budget.step_done()
        assert budget.tokens == 1000 and not budget.lowered


def test_one_sequence_that_does_not_fit_ends_with_one_line():
    budget = TokenBudget(1000, "set use_peft=true")
    with pytest.raises(NoMemoryLeft, match=r"one sequence of 100 tokens in a pass \(.* GiB held at most\): set use_pe"):
        repeat_smaller(budget, fitting(90, [100] * 10, budget, []))
    assert issubclass(NoMemoryLeft, Refused)


def test_what_another_rank_lacks_is_repeated_here_too():
    told = [Shortage(600, False, 1.0), None]
    budget = TokenBudget(1000, "")
    attempts = []
    repeat_smaller(budget, attempts.append, agree=lambda mine: told.pop(0))
    assert len(attempts) == 2 and budget.tokens == 300


def test_where_others_wait_it_ends_at_once():
    watch = Watch(TokenBudget(1000, ""), agree=lambda mine: mine)
    watch.plan([(600, 4)])
    watch.enter()
    with pytest.raises(NoMemoryLeft, match="amid a pass of 600 tokens .* set logprob_token_budget=300"):
        watch.lose(ERRORS[0])
    watch.leave()
    watch.lose(ERRORS[0])
    with pytest.raises(RanOut):
        watch.meet()


def test_what_a_failed_attempt_held_is_free_before_the_next():
    class Held:
        pass

    import weakref

    alive, held = [], []

    def attempt(watch: Watch) -> None:
        alive.append(sum(reference() is not None for reference in held))
        mine = Held()
        held.append(weakref.ref(mine))
        watch.plan([(100, 2)])
        if len(held) < 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    repeat_smaller(TokenBudget(100, ""), attempt)
    assert alive == [0, 0]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_readings_for_scores_are_the_same_in_smaller_passes(times, monkeypatch):
    model, sequences = llama(), [[3, 1, 4, 1, 5, 9, 2, 6, *range(7 * k, 7 * k + 6)] for k in range(6)]
    counted = [list(range(4, len(ids))) for ids in sequences]
    with torch.no_grad():
        expected, _ = token_log_probs(model, sequences, counted, token_budget=1000)
    calls = []

    def reading(*arguments):
        calls.append(arguments)
        if len(calls) == times:
            raise ERRORS[0]
        return head(*arguments)

    head = engine.head_log_probs
    monkeypatch.setattr(engine, "head_log_probs", reading)
    found = lasting_log_probs(20)(model, sequences, counted, 1.0)
    assert len(calls) >= times
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_the_module_knows_no_trainer():
    text = (ROOT / "rlt/survival/oom.py").read_text()
    assert "trl" not in text and "transformers" not in text
