"""The replication's rows and statistics; its runs are those of the other tests."""

import json
import sys
from collections import Counter

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "replication"))
import outcome  # noqa: E402
import rows  # noqa: E402


def test_no_run_sees_a_question_that_is_evaluated(tmp_path):
    rows.write_questions(tmp_path, range(1, 3))
    evaluated = {row["question"] for row in rows.read(tmp_path / "evaluate.jsonl")}
    assert len(evaluated) == 2 * rows.SIZES["evaluate"]
    for seed in (1, 2):
        roles = {
            role: rows.read(tmp_path / str(seed) / f"{role}.jsonl") for role in ("format", "warmup", "teach", "collect")
        }
        seen = [row["question"] for mine in roles.values() for row in mine]
        assert len(seen) == len(set(seen))
        assert not evaluated & set(seen)
        for role, mine in roles.items():
            assert set(Counter(row["task"] for row in mine).values()) == {rows.SIZES[role]}
            assert all(row["reasoning_trace"] for row in mine)


def test_sets_are_cut_to_the_tokens_of_the_smallest(tmp_path):
    short, long = ([{"question": "q", "solution": "4", "reasoning_trace": "Two and two. " * n}] * 10 for n in (1, 3))
    budget = rows.write_equal({"short": short, "long": long}, tmp_path)
    assert len(rows.read(tmp_path / "short.jsonl")) == 10
    kept = len(rows.read(tmp_path / "long.jsonl"))
    assert 0 < kept < 10
    assert rows.write_equal({"long": long[:kept]}, tmp_path / "again") <= budget
    assert rows.write_equal({"long": long[: kept + 1]}, tmp_path / "more") > budget


def test_the_correlation_by_hand():
    r = outcome.correlation([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0])
    assert r.mean == pytest.approx(0.8)
    assert r.low <= 0.8 <= r.high


def test_differences_are_paired_by_seed_and_question(tmp_path):
    for seed, right in ((1, [1.0, 0.0]), (2, [0.0, 0.0])):
        folder = tmp_path / str(seed) / "rl" / "evaluation"
        folder.mkdir(parents=True)
        accuracy = dict(zip(("a", "b"), right, strict=True))
        (folder / "evaluation.json").write_text(json.dumps({"accuracy": accuracy}))
    found = outcome.accuracies(tmp_path, "rl", range(1, 3))
    assert found == {"1 a": 1.0, "1 b": 0.0, "2 a": 0.0, "2 b": 0.0}
    assert outcome.mean_of(found, 1) == 0.5
    pooled = outcome.over_seeds(found)
    assert pooled == {"a": 0.5, "b": 0.0}
    assert outcome.of_task(pooled, "sums", {"a": "sums", "b": "other"}) == 0.5


def test_the_base_model_and_the_novice_are_asked_once_for_all_seeds(tmp_path):
    for arm in ("base", "novice"):
        (tmp_path / arm / "evaluation").mkdir(parents=True)
        (tmp_path / arm / "evaluation" / "evaluation.json").write_text('{"accuracy": {"a": 1.0}}')
        assert outcome.accuracies(tmp_path, arm, range(1, 4)) == {"1 a": 1.0}


def test_rows_of_other_settings_are_not_overwritten(tmp_path):
    rows._write(tmp_path / "a.jsonl", [{"question": "1 + 1"}])
    rows._write(tmp_path / "a.jsonl", [{"question": "1 + 1"}])
    with pytest.raises(ValueError, match="holds other rows"):
        rows._write(tmp_path / "a.jsonl", [{"question": "1 + 2"}])
