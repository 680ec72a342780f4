"""Answers: found in a text, checked by the right check, in time, whatever the text is."""

import inspect
import json
import re
from dataclasses import replace

import pytest
from reasoning_gym.factory import DATASETS, ProceduralDataset

from data.formats import FORMATS
from data.sources import load_rows
from rewards.verified import verified_rewards
from rewards.verifiers import RUN_WHAT_THEY_ARE_GIVEN, Verifier, check_rows, final_answer, is_for_generator, kind_of
from schema import VerifiedRewardConfig

STYLE = FORMATS["stratos"]


@pytest.fixture(scope="module")
def verifier():
    return Verifier(limit_s=5.0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<|begin_of_solution|>42<|end_of_solution|>", "42"),
        ("<|begin_of_solution|>1<|end_of_solution|> no: <|begin_of_solution|> 2 ", "2"),
        ("<|begin_of_solution|><|end_of_solution|>", None),
        ("Let us see.\nAnswer: 7\nAnswer: 8 ", "8"),
        ("I do not know", None),
    ],
)
def test_the_answer_stands_in_the_sections_or_on_the_last_answer_line(text, answer):
    assert final_answer(text, STYLE) == answer


@pytest.mark.parametrize(
    ("answer", "solution", "right"),
    [
        ("\\frac{1}{2}", "0.5", 1.0),
        ("0.501", "0.5", 0.0),
        ("(x+1)^2", "x^2 + 2x + 1", 1.0),
        ("the answer is (C)", "C", 1.0),
        ("A or B", "A", 0.0),
        ("Paris", "paris ", 1.0),
    ],
)
def test_mathematics_and_choices(verifier, answer, solution, right):
    assert verifier.check(answer, {"solution": solution}) == right


def test_a_generators_task_checks_its_own(verifier):
    row = {
        "question": "GCD of 12 and 18",
        "solution": "6",
        "task": "gcd",
        "metadata": json.dumps({"numbers": [12, 18]}),
    }
    assert kind_of(row) == "generator"
    assert (verifier.check("6", row), verifier.check("3", row), verifier.check(None, row)) == (1.0, 0.0, 0.0)


def test_a_puzzle_of_numbers_is_its_numbers_and_its_value(verifier):
    row = {"question": "Calculate 10 using 4, 3, 2", "solution": "4*3 - 2", "task": "countdown"}
    row["metadata"] = json.dumps({"numbers": [4, 3, 2], "target": 10})
    answers = {"3*4 - 2": 1.0, "-2 + (4 * 3)": 1.0, "10": 0.0, "4 + 3 + 2": 0.0, "4*3 - 2 + 0": 0.0, "4**3": 0.0}
    assert {answer: verifier.check(answer, row) for answer in answers} == answers


def test_no_check_of_a_generator_runs_what_it_is_given():
    """Read from the installed checks, so that a new release cannot add one unseen."""
    found = set()
    for name, (cls, _) in DATASETS.items():
        own = inspect.getsource(cls.score_answer) if cls.score_answer is not ProceduralDataset.score_answer else ""
        if re.search(r"(?<!\.)\b(eval|exec|parse_expr|sympify)\(", own):
            found.add(name)
    assert found <= set(RUN_WHAT_THEY_ARE_GIVEN)
    assert {"countdown", "spiral_matrix"} <= found


def test_a_generators_check_is_refused_for_rows_that_have_none():
    row = {"question": "?", "solution": "1", "task": "gcd", "metadata": "{}"}
    check_rows("generator", [row])
    check_rows("auto", [{**row, "task": "countdown"}])
    for other in ({**row, "task": "countdown"}, {"question": "?", "solution": "1"}):
        with pytest.raises(ValueError, match="verifier=generator: row 2 .* has nothing that this check can use"):
            check_rows("generator", [row, other])
    check_rows("expression", [{**row, "task": "countdown"}])
    with pytest.raises(ValueError, match="verifier=expression: row 1"):
        check_rows("expression", [row])


def test_columns_of_someones_own_are_no_generators():
    row = {"question": "Half of 1?", "solution": "0.5", "task": "algebra", "metadata": '{"source": "x"}'}
    assert kind_of(row) == "math" and Verifier().check("\\frac{1}{2}", row) == 1


def test_a_generators_check_knows_the_options_of_its_rows():
    loose, strict = (
        load_rows(f"reasoning_gym/decimal_arithmetic/max_num_decimal_places:{places}", size=1).rows[0]
        for places in (3, 6)
    )
    for row, right in ((loose, 1), (strict, 0)):  # half a thousandth off
        near = f"{float(row['solution']) + 0.0004:.6f}"
        assert is_for_generator(near, row) == right


@pytest.mark.parametrize(
    "text", ["9**9**9**9", "$9^{9^{9^{9^9}}}$", "\\frac{" * 3000, "(" * 10_000, "\x00\ud800", "{}"]
)
def test_hostile_text_is_wrong_and_the_next_check_works(text):
    verifier = Verifier("math", limit_s=2.0)
    assert verifier.check(text, {"solution": "2"}) == 0.0
    assert verifier.check("4/2", {"solution": "2"}) == 1.0


def test_a_check_that_throws_is_counted():
    verifier = Verifier("generator")
    row = {"question": "?", "solution": "1", "task": "no_such_task", "metadata": "{}"}
    assert verifier.check("2", row) == 0.0
    assert verifier.failures == 1


def test_rewards_of_answer_format_and_length():
    config = VerifiedRewardConfig(1.0, 0.1, 0.5, length_free=10, verifier="exact", verifier_limit_s=1.0)
    functions, weights = verified_rewards(config, STYLE)
    assert weights == [1.0, 0.1, 0.5]
    logged = {}
    columns = {
        "completions": ["Answer: 6", "Answer: 5", "six"],
        "solution": ["6"] * 3,
        "completion_ids": [[0] * 10, [0] * 15, [0] * 40],
        "log_metric": logged.__setitem__,
    }
    assert [function(**columns) for function in functions] == [[1, 0, 0], [1, 1, 0], [0, -0.5, -1]]
    assert logged == {"verifier/failures": 0.0}
    alone, weight = verified_rewards(replace(config, format_weight=0.0, length_weight=0.0), STYLE)
    assert weight == [1.0] and [function.__name__ for function in alone] == ["answer_reward"]
