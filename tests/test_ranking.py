"""Ranks and win shares, by hand."""

import json
import math

import pytest
from test_score import rows, score  # noqa: F401  (rows is a fixture)

from rlt.traces.ranking import ranks, sources_of, summary


def test_ranks_follow_the_reward_and_what_has_none_comes_last():
    assert ranks([-2.0, -1.0, math.nan, -1.0]) == [3, 1, 4, 2]


def test_wins_are_shares_of_the_questions_that_a_source_took_part_in():
    found = summary([(["a", "b"], [1.0, 2.0]), (["a", "b"], [3.0, 0.0]), (["a"], [5.0]), (["b"], [math.nan])])
    assert found["a"] == {
        "completions": 3,
        "won": 2,
        "win_share": pytest.approx(2 / 3),
        "mean_rank": pytest.approx(4 / 3),
        "mean_reward": 3.0,
    }
    assert found["b"]["won"] == 1  # a completion without a reward wins nothing, though it is alone
    assert found["b"]["win_share"] == pytest.approx(1 / 3)
    assert found["b"]["mean_reward"] == 1.0


def test_equal_best_completions_share_their_question():
    found = summary([(["a", "b", "b"], [2.0, 2.0, 1.0]), (["a", "b", "b"], [0.0, 3.0, 3.0])])
    assert (found["a"]["won"], found["b"]["won"]) == (0.5, 1.5)
    assert found["b"]["win_share"] == 0.75
    assert found["a"]["mean_rank"] == (1.5 + 3) / 2


def test_without_sources_places_are_named():
    assert sources_of({}, 2) == ["completion 0", "completion 1"]
    with pytest.raises(ValueError, match="2 completions need a list of 2 'sources'"):
        sources_of({"sources": ["a"]}, 2)


def test_score_ranks_the_completions_of_a_line(rows, tmp_path, tiny_teacher, tiny_student):  # noqa: F811
    out = tmp_path / "out.jsonl"
    done = score(rows, out, tiny_teacher, tiny_student)
    assert done.returncode == 0, done.stderr
    one, two = [json.loads(line) for line in out.read_text().splitlines()]
    assert "rank" not in one
    best = two["reward"].index(max(two["reward"]))
    assert two["best_index"] == best
    assert two["rank"][best] == 1
    assert sorted(two["rank"]) == [1, 2]
    ranking = json.loads((tmp_path / "out.jsonl.ranking.json").read_text())
    assert ranking[f"completion {best}"]["win_share"] == 1.0
    assert "win share" in done.stdout
