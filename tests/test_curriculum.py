"""The curriculum by length: shares of tokens, constant tokens a step, and an order that a checkpoint goes on with."""

import json
from collections import Counter

import numpy
import pytest

from rlt.errors import Refused
from rlt.planning.curriculum import Phase, phases_of
from trainers.curriculum import CurriculumSampler

BUCKETS = [256] * 40 + [512] * 30 + [1024] * 20  # of 90 rows
PHASES = [Phase(6, {256: 0.75, 512: 0.25}), Phase(None, {512: 0.5, 1024: 0.5})]


def sampler(phases=PHASES, **keys) -> CurriculumSampler:
    options = {"max_length": 1024, "rows_each": 2, "rounds_of_step": 2, "steps": 20, "seed": 0}
    return CurriculumSampler(BUCKETS, phases, **{**options, **keys})


def lengths(batch: list[int]) -> set[int]:
    return {BUCKETS[row] for row in batch}


def test_each_micro_batch_has_rows_of_one_length_and_the_same_tokens():
    batches = list(sampler())
    assert len(batches) == 40
    assert all(len(lengths(batch)) == 1 and sum(BUCKETS[row] for row in batch) == 2048 for batch in batches)


def test_phases_have_their_shares_of_the_tokens_and_end_at_their_step():
    batches = [lengths(batch).pop() for batch in sampler()]
    assert Counter(batches[:12]) == {256: 9, 512: 3}  # six steps of two micro-batches
    assert Counter(batches[12:]) == {512: 14, 1024: 14}
    assert Counter(batches[12:16]) == {512: 2, 1024: 2}  # at every moment, not in the end alone


def test_all_rows_of_a_length_come_once_before_any_comes_again_in_another_order():
    drawn = [row for batch in sampler([Phase(None, {1024: 1.0})]) for row in batch]
    rounds = [drawn[start : start + 20] for start in range(0, 80, 20)]
    assert all(sorted(some) == list(range(70, 90)) for some in rounds)
    assert len({tuple(some) for some in rounds}) == 4
    assert drawn != [row for batch in sampler([Phase(None, {1024: 1.0})], seed=1) for row in batch]


@pytest.mark.parametrize("rounds", [0, 1, 7, 12, 13, 25, 39])
def test_a_state_goes_on_as_if_nothing_had_happened(rounds):
    undisturbed = list(sampler())
    state = json.loads(json.dumps(sampler().state_dict(rounds)))  # as a checkpoint has it
    resumed = sampler()
    resumed.load_state_dict(state)
    batches = list(resumed)
    assert batches[:rounds] == [[]] * rounds  # which a trainer skips
    assert batches[rounds:] == undisturbed[rounds:]


def test_a_state_is_of_what_was_trained_on_not_of_what_a_loader_has_drawn_ahead():
    ahead = sampler()
    drawing = iter(ahead)
    for _ in range(30):
        next(drawing)
    assert ahead.state_dict(10) == sampler().state_dict(10)
    assert ahead.state_dict(14) == sampler().state_dict(14)
    assert ahead.state_dict(4) == sampler().state_dict(4)


def test_a_state_goes_on_where_the_phases_to_come_are_others():
    state = sampler().state_dict(12)
    longer = sampler([PHASES[0], Phase(None, {1024: 1.0})])
    longer.load_state_dict(state)
    later = list(longer)[12:]
    assert {length for batch in later for length in lengths(batch)} == {1024}


def test_ranks_draw_the_same_lengths_and_other_rows():
    ranks = [list(sampler(rank=rank, ranks=2)) for rank in range(2)]
    for mine, theirs in zip(*ranks, strict=True):
        assert lengths(mine) == lengths(theirs) and mine != theirs
    together = [row for pair in zip(*ranks, strict=True) for batch in pair for row in batch]
    alone = [row for batch in sampler(rows_each=4) for row in batch]
    assert together == alone


def test_shares_are_kept_over_many_steps():
    shares = {256: 0.13, 512: 0.29, 1024: 0.58}
    drawn = Counter(lengths(batch).pop() for batch in sampler([Phase(None, shares)], steps=500))
    for length, share in shares.items():
        assert drawn[length] == pytest.approx(1000 * share, abs=1)


def test_a_length_that_no_row_has_is_refused():
    with pytest.raises(Refused, match="no packed row has 128 tokens: there are 256, 512, 1024"):
        sampler([Phase(None, {128: 1.0})])


def test_the_key_is_read_with_numbers_as_text_too():
    found = phases_of([{"until_step": 5, "buckets": {"512": 1}}, {"buckets": {1024: 0.7, 512: 0.3}}], 1024)
    assert found == [Phase(5, {512: 1.0}), Phase(None, {512: 0.3, 1024: 0.7})]


@pytest.mark.parametrize(
    ("curriculum", "message"),
    [
        ([], "curriculum is empty"),
        ([{"buckets": {1024: 0.5}}], "must add up to 1"),
        ([{"buckets": {1000: 1}}], "1000 does not divide max_length=1024"),
        ([{"buckets": {1024: 1.5, 512: -0.5}}], "the share of 512 is -0.5"),
        ([{"buckets": [1024]}], r"must be \{length: share\}"),
        ([{"until_step": 5, "bucket": {1024: 1}}], "phase 0 must be"),
        ([5], "phase 0 must be"),
        ([{"buckets": {1024: 1}}, {"buckets": {512: 1}}], "phase 0: until_step=None"),
        ([{"until_step": 5, "buckets": {1024: 1}}, {"until_step": 5, "buckets": {512: 1}}], "must be a step after 5"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(curriculum, message):
    with pytest.raises(Refused, match=message):
        phases_of(curriculum, 1024)


def test_buckets_may_come_as_an_array():
    assert list(CurriculumSampler(numpy.array(BUCKETS), PHASES, max_length=1024, rows_each=2, rounds_of_step=2,
                                  steps=20, seed=0)) == list(sampler())  # fmt: skip
