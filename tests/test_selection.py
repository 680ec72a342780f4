"""Which traces become data, and what is said of the others; figures of evaluations."""

import math

import pytest

from rlt.data.duplicates import similarity
from rlt.estimates import bootstrap, paired_difference, pass_at_k
from rlt.schema import TraceConfig
from rlt.traces.selection import check_format, rank, select

CONFIG = TraceConfig(
    traces_per_question=3,
    keep_per_question=1,
    min_reward_quantile=0.0,
    min_format_rate=0.05,
    max_student_length=100,
    near_duplicate_similarity=0.9,
    select="reward",
    select_student_tokens=None,
)


def row(question, reward, trace="a trace of its own", matched=True, tokens=10):
    return {
        "question_id": question,
        "question": f"q{question}",
        "solution": "s",
        "reasoning_trace": f"{trace} {reward}",
        "reward": reward,
        "matched": matched,
        "student_tokens": tokens,
    }


def changed(**values):
    return TraceConfig(**{**vars(CONFIG), **values})


def test_ranks_are_within_a_question():
    ranked = rank([row(0, -2.0), row(1, -5.0), row(0, -1.0), row(1, -6.0)])
    assert [(r["question_id"], r["reward"], r["rank"]) for r in ranked] == [
        (0, -1.0, 1),
        (0, -2.0, 2),
        (1, -5.0, 1),
        (1, -6.0, 2),
    ]


def test_a_question_that_comes_twice_is_one():
    again = {**row(7, -0.5, "in other words"), "question": " Q0 "}
    ranked = rank([row(0, -1.0), again])
    assert [(r["question_id"], r["rank"]) for r in ranked] == [(7, 1), (0, 2)]
    selection = select(ranked, CONFIG)
    assert [r["question_id"] for r in selection.kept] == [7] and selection.questions == 1


def test_every_row_that_is_out_is_counted_by_its_reason():
    rows = rank(
        [
            *(row(0, -1.0), row(0, -2.0)),
            row(1, -1.5, matched=False),
            row(2, float("-inf")),
            row(3, -0.5, tokens=101),
            row(4, -9.0),
        ]
    )
    selection = select(rows, changed(min_reward_quantile=0.1))
    assert [(r["question_id"], r["reward"]) for r in selection.kept] == [(0, -1.0)]
    assert selection.dropped == {
        "not among the best 1 of its question": 1,
        "format": 1,
        "no finite reward": 1,
        "longer than max_student_length=100": 1,
        "below the reward quantile 0.1": 1,
    }
    assert selection.scored == len(selection.kept) + sum(selection.dropped.values()) == 6


def test_near_duplicates_of_a_better_trace_are_out():
    words = "one two three four five six seven eight nine ten eleven twelve"
    rows = [row(0, -1.0), row(0, -1.1), row(0, -1.2)]
    for r, trace in zip(rows, (words, words.upper(), words[::-1]), strict=True):
        r["reasoning_trace"] = trace
    selection = select(rank(rows), changed(keep_per_question=3))
    assert [r["reward"] for r in selection.kept] == [-1.0, -1.2]
    assert selection.dropped == {"near-duplicate": 1}


def test_similarity_by_hand():
    # Runs of five of "a b c d e f" and "a b c d e g": {abcde, bcdef}, {abcde, bcdeg}: 1 of 3.
    assert similarity("a b c d e f", "A, b c d e g") == pytest.approx(1 / 3)
    assert similarity("", "") == 1.0


def test_a_teacher_without_the_format_is_refused():
    rows = rank([row(i, -1.0, matched=False) for i in range(99)] + [row(99, -1.0)])
    with pytest.raises(ValueError, match="1.0% of 100 completions have the asked format"):
        select(rows, CONFIG)


def test_when_nothing_is_left_the_reasons_are_said():
    with pytest.raises(ValueError, match="none of 1 traces is left: .*max_student_length=100': 1"):
        select(rank([row(0, -1.0, tokens=200)]), CONFIG)


def test_pass_at_k_by_hand():
    # 2 of 4 right: a pair without a right one is 1 of 6.
    assert pass_at_k(2, 4, 2) == pytest.approx(5 / 6)
    assert pass_at_k(1, 4, 1) == 0.25
    assert pass_at_k(0, 4, 4) == 0.0
    with pytest.raises(ValueError, match="pass@5 cannot be had from 4"):
        pass_at_k(1, 4, 5)


def test_differences_are_paired_by_question():
    difference = paired_difference({"a": 0.0, "b": 0.5, "only": 1.0}, {"b": 0.75, "a": 0.25})
    assert (difference.mean, difference.low, difference.high) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="share no question"):
        paired_difference({"a": 0.0}, {"b": 1.0})
    assert math.isnan(bootstrap([float("nan")]).mean)


def test_a_part_is_refused_only_where_chance_does_not_explain_it():
    # 256 completions at 5 %: 12.8 are expected, with a standard deviation of 3.49.
    with pytest.raises(ValueError, match="0.4% of 256 completions have the asked format"):
        check_format(1, 256, 0.05, deviations=3.3)
    check_format(2, 256, 0.05, deviations=3.3)
    check_format(0, 9, 0.05, deviations=3.3)
