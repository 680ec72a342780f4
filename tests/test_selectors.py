"""Traces chosen by reward, likelihood, rank-surprisal ratio or chance, for as many tokens as are asked for."""

import json
import math
from dataclasses import replace

import pandas
import pytest
from conftest import config_of, launch
from test_selection import CONFIG

from rlt.errors import Refused
from rlt.planning.plan import make_plan
from rlt.prompts.styles import load_format
from rlt.traces.ranking import SELECTORS, worth
from rlt.traces.scored import select_scored
from rlt.traces.selection import Budget, rank, select

END = "<|end_of_explanation|>"


def trace(question: int, name: str, reward: float, likelihood: float, rsr: float, tokens: int = 10) -> dict:
    scores = {"reward": reward, "likelihood": likelihood, "rsr": rsr, "matched": True}
    scores |= {"student_tokens": 20 + tokens, "trained_tokens": tokens}
    texts = {"reasoning_trace": f"trace {name}", "completion": f"trace {name}{END}"}
    return {"question_id": question, "question": f"q{question}", "solution": "s", **texts, **scores}


ROWS = [
    trace(0, "a", -1.0, -2.0, 9.0),
    trace(0, "b", -3.0, -1.0, 5.0),
    trace(0, "c", -2.0, -3.0, 4.0),
    trace(1, "d", -9.0, -2.0, 7.0, tokens=30),
    trace(1, "e", -8.0, -3.0, math.nan, tokens=50),
    trace(2, "f", -7.0, -4.0, 3.0),
]
CHOSEN = {"reward": "aef", "likelihood": "bdf", "rsr": "cdf"}


@pytest.mark.parametrize("by", CHOSEN)
def test_each_selector_takes_the_best_of_each_question(by):
    kept = select(rank(ROWS, by), replace(CONFIG, select=by)).kept
    assert "".join(row["reasoning_trace"][-1] for row in kept) == CHOSEN[by]
    again, _ = select_scored(ROWS, load_format("stratos"), by, 0, None, "rows")
    assert [row["reasoning_trace"] for row in again] == [row["reasoning_trace"] for row in kept]


def test_chance_is_drawn_by_the_seed_and_takes_each_trace_as_often():
    first = ["".join(row["reasoning_trace"][-1] for row in rank(ROWS, "random", seed)[:1]) for seed in range(300)]
    assert first[:20] == ["".join(r["reasoning_trace"][-1] for r in rank(ROWS, "random", s)[:1]) for s in range(20)]
    assert all(70 < first.count(name) < 130 for name in "abc")
    assert worth(ROWS[0], "random", 1, 0) != worth(ROWS[0], "random", 1, 1)


def test_a_ratio_that_is_not_finite_is_out_and_counted():
    selection = select(rank(ROWS[3:5], "rsr"), replace(CONFIG, select="rsr"))
    assert [row["reasoning_trace"] for row in selection.kept] == ["trace d"]
    assert selection.dropped == {"no finite rsr": 1}


def test_a_budget_ends_with_the_first_text_that_is_too_much():
    budget = Budget(50)
    assert [budget.against(tokens) for tokens in (20, 30, 1)] == [None, None, "beyond select_student_tokens=50"]
    budget = Budget(50)
    assert [budget.against(tokens) is None for tokens in (20, 31, 5)] == [True, False, False]
    assert Budget(None).against(10**9) is None


@pytest.mark.parametrize(("by", "names"), [("reward", "a"), ("rsr", "cd"), ("likelihood", "bd")])
def test_selections_have_at_most_so_many_trained_tokens_from_the_first_question_on(by, names):
    config = replace(CONFIG, select=by, select_student_tokens=45)
    selection = select(rank(ROWS, by), config)
    assert "".join(row["reasoning_trace"][-1] for row in selection.kept) == names  # the reward's second has 50 tokens
    assert selection.dropped["beyond select_student_tokens=45"] >= 1
    again, dropped = select_scored(ROWS, load_format("stratos"), by, 0, 45, "rows")
    assert "".join(row["reasoning_trace"][-1] for row in again) == names
    assert dropped == {"beyond select_student_tokens=45": 3 - len(names)}


def test_rows_of_several_completions_are_taken_apart():
    row = {"question": "q", "solution": "s", "completions": [f"one{END}", f"two{END}", "three"]}
    row |= {"rsr": [2.0, 1.0, 0.5], "match_reward": [0.0, 0.0, -1.0], "trained_tokens": [5, 6, 7]}
    (best,), _ = select_scored([row], load_format("stratos"), "rsr", 0, 6, "rows")
    assert best["reasoning_trace"] == "two" and best["trained_tokens"] == 6 and "completions" not in best


def test_a_completion_that_is_chosen_keeps_all_of_its_own_scores_and_none_of_its_siblings():
    row = {"question": "q", "solution": "s", "completions": [f"one{END}", f"two{END}"], "sources": ["x", "y"]}
    row |= {"reward": [1.0, 2.0], "kl_reward": [-1.0, None], "rank": [2, 1], "best_index": 1, "tags": ["a", "b"]}
    (best,), _ = select_scored([row], load_format("stratos"), "reward", 0, None, "rows")
    own = {"completion": f"two{END}", "reasoning_trace": "two", "matched": True, "rank": 1}
    asked = {"question": "q", "solution": "s", "tags": ["a", "b"]}  # a row's own list of as many texts stays whole
    assert best == {**asked, **own, "reward": 2.0, "kl_reward": None, "sources": "y"}


def test_a_format_is_read_off_the_text_whatever_its_penalty_was():
    rows = [{"question": "q", "solution": "s", "completion": text, "match_reward": 0} for text in ("a", f"b{END}")]
    (best,), _ = select_scored(rows, load_format("stratos"), "random", 0, None, "rows")
    assert best["reasoning_trace"] == "b"


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"completion": "a", "reward": "x"}, "rows row 1: reward must be a number, not 'x'"),
        (
            {"completions": ["a", "b"], "reward": [1.0]},
            "reward must be a list of 2 numbers, one for each completion, not",
        ),
        ({"completions": ["a", "b"], "reward": [1.0, "x"]}, "one for each completion, not [1.0, 'x']"),
    ],
)
def test_scores_that_cannot_be_read_are_named(scores, said):
    with pytest.raises(Refused) as refused:
        select_scored([{"question": "q", "solution": "s", **scores}], load_format("stratos"), "reward", 0, None, "rows")
    assert said in str(refused.value)


BAD = [
    (["select=best"], "select=best: use one of reward, likelihood, rsr, random"),
    (["select=rsr", "report_rsr=false"], "select=rsr needs the student's log-probs and ranks: set report_rsr=true"),
    (["select_student_tokens=0"], "select_student_tokens=0 must be at least 1"),
]


@pytest.mark.parametrize(("overrides", "said"), BAD)
def test_a_collection_that_cannot_select_is_refused_at_the_plan(overrides, said):
    with pytest.raises(Refused, match=said):
        make_plan(config_of("collect_tiny", *overrides, "dry_run=true"))


@pytest.mark.parametrize("by", SELECTORS)
def test_every_selector_is_planned(by):
    assert make_plan(config_of("collect_tiny", f"select={by}", "dry_run=true")).settings.report_rsr


def test_score_selects_among_rows_that_are_scored_and_refuses_what_they_lack(tmp_path):
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "traces.parquet")
    source = f"input={tmp_path / 'traces.parquet'}"
    done = launch("score.py", source, f"output={tmp_path / 'out.jsonl'}", "select=rsr", "select_student_tokens=45")
    assert done.returncode == 0, done.stderr
    assert "2 of 6 rows selected by rsr" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["reasoning_trace"] for row in rows] == ["trace c", "trace d"]
    pandas.DataFrame(ROWS).drop(columns="rsr").to_parquet(tmp_path / "traces.parquet")
    refused = launch("score.py", source, f"output={tmp_path / 'other.jsonl'}", "select=rsr")
    (line,) = refused.stderr.splitlines()
    assert "has rows without 'rsr': score them with report_rsr=true" in line and refused.returncode == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher_model=embedded/smollm2-135m-instruct"], "teacher_model alone: name teacher_model and student_model"),
        (["select=worst"], "select=worst: use one of"),
        (["reward_cfg=spikes"], "reward_cfg=spikes: use one of"),
    ],
)
def test_what_score_cannot_do_is_refused_in_one_line(overrides, said, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "q", "solution": "s", "completion": "c"}))
    refused = launch("score.py", f"input={tmp_path / 'rows.jsonl'}", f"output={tmp_path / 'o.jsonl'}", *overrides)
    (line,) = refused.stderr.splitlines()
    assert said in line and refused.returncode == 1
