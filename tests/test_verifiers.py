"""Answers: found in a text, checked by the right check, in time, whatever the text is."""

import json
from dataclasses import replace

import pytest

from rlt.data.sources import load_rows
from rlt.prompts.styles import FORMATS
from rlt.rewards.verified import verified_rewards
from rlt.rewards.verifiers import (
    Verifier,
    check_rows,
    final_answer,
    is_choice,
    is_for_generator,
    kind_of,
)
from rlt.schema import VerifiedRewardConfig

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
        ("**Answer:** $42$", "42"),
        ("**Answer: 42**", "42"),
        ("**Answer**: 42", "42"),
        ("__Answer:__ 42", "42"),
        ("answer: 42", "42"),
        ("ANSWER : 42", "42"),
        ("Answer：42", "42"),
        ("Answer:\n\n42", "42"),
        ("Answer: **", None),
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
        ("12 dollars", "12", 1.0),
        ("12", "12 dollars", 1.0),
        ("12 books", "12", 1.0),
        ("12 years old", "12", 1.0),
        ("60 km/h", "60", 1.0),
        ("12 cm^2", "12", 1.0),
        ("€5", "5", 1.0),
        ("2*pi", "2\\pi", 1.0),
        ("\\[42\\]", "42", 1.0),
        ("1 234", "1234", 1.0),
        ("1e5", "100000", 1.0),
        ("13 dollars", "12", 0.0),
        ("2x", "2", 0.0),
        ("2 pi", "2", 0.0),
        ("5 m", "5 cm", 0.0),
        ("12 books", "12.5", 0.0),
        ("(2,1)", "(1,2)", 0.0),
        ("3x+4y+14=0", "3x-y+13=0", 0.0),
        ("21, 36, and 82", "19, 46, and 82", 0.0),
        ("x=2 or x=3", "x=2", 0.0),
    ],
)
def test_mathematics_and_choices(verifier, answer, solution, right):
    assert verifier.check(answer, {"solution": solution}) == right


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B) 3.2 J", "B"),
        ("A) Compound B", "A"),
        ("A", "A"),
        ("(A)", "A"),
        ("A.", "A"),
        ("A: as B has no charge", "A"),
        ("**A** because of B", "A"),
        ("**C)** 4 J", "C"),
        ("A or \\boxed{B}, not C", "B"),
        ("A) no, \\boxed{\\text{D}}", "D"),
        ("I think B", "B"),
        ("I", "I"),
        ("I) 3.2 J", "I"),
        ("the answer is (I).", "I"),
        ("the answer is I.", "I"),
    ],
)
def test_a_choice_is_boxed_or_comes_first_or_stands_alone(answer, letter):
    assert kind_of({"solution": letter}) == "choice"
    assert [other for other in "ABCDEFGHIJ" if is_choice(answer, {"solution": other})] == [letter]


def test_a_text_without_a_letter_is_no_choice():
    assert is_choice("I do not know", {"solution": "B"}) == is_choice("I am", {"solution": "none"}) == 0.0


@pytest.mark.parametrize(
    ("answer", "solution", "right"),
    [
        ("stop", "post", 0.0),  # as products of letters they would be equal
        ("GBRG", "RGGB", 0.0),
        ("**\\text{post}**", "post", 1.0),
        ("cos(x)*exp(x) + C", "exp(x)*cos(x) + C", 1.0),  # words of mathematics
        ("1, 2, 3", "3, 1, 2", 1.0),  # roots have no order
        ("(3, 1, 2)", "3,1,2", 1.0),
        ("0.5, 3", "\\frac{1}{2}, 3", 1.0),
        ("1, 2", "1, 2, 3", 0.0),
        ("2, 1", "\\{1, 2\\}", 1.0),
        ("-1, 3", "1 \\pm 2", 1.0),
        ("y = 2, x = 1", "x = 1, y = 2", 1.0),
        ("(3, \\infty) \\cup (-\\infty, 2)", "(-\\infty, 2) \\cup (3, \\infty)", 1.0),
        ("x = 3", "3", 1.0),
        ("5", "5\\text{ cm}", 1.0),
        ("1,200", "1200", 1.0),
        ("1200", "1,\\!200", 1.0),
        ("1,200", "200", 0.0),
        ("18.90", "\\$18.90", 1.0),
        ("4x^3 - 2x**5", "-2*x**5 + 4*x**3", 1.0),
        ("4", "-2*x**5 + 4*x**3", 0.0),  # the last number that was read of it
    ],
)
def test_words_and_lists_are_compared_as_they_stand_and_numbers_by_value(verifier, answer, solution, right):
    assert verifier.check(answer, {"solution": solution}) == right
    assert verifier.failures == 0


@pytest.mark.parametrize(
    ("answer", "solution", "right"),
    [
        ("12 people", "12", 1.0),
        ("12 marbles", "12", 1.0),
        ("pi/2", "\\frac{\\pi}{2}", 1.0),
        ("1\\,234", "1234", 1.0),
        ("1 2345", "12345", 0.0),
        ("3 1/2", "3.5", 1.0),
        ("3 1/2", "\\frac{7}{2}", 1.0),
        ("3 1/2", "1.5", 0.0),
        ("3½", "\\frac{7}{2}", 1.0),
        ("½", "1/2", 1.0),
        ("-½", "1/2", 0.0),
        ("√2", "\\sqrt{2}", 1.0),
        ("2√3", "\\sqrt{12}", 1.0),
        ("√3", "\\sqrt{2}", 0.0),
        ("42 (forty-two)", "42", 1.0),
        ("42 (forty-three)", "42", 0.0),
        ("3 (million)", "3", 0.0),
        ("approximately 3.14", "3.14", 1.0),
        ("The answer is 42.", "42", 1.0),
        ("12cm", "12", 1.0),
        ("0.3333333", "1/3", 1.0),
        ("0.333", "1/3", 0.0),
        ("5 s", "5 m", 0.0),
        ("€5", "5 euros", 1.0),
        ("€5", "£5", 0.0),
        ("3 million", "3,000,000", 1.0),
        ("3 million", "3", 0.0),
        ("$3$ million", "3", 0.0),
        ("2 dozen eggs", "24", 1.0),
        ("minus 12", "12", 0.0),
        ("minus 12", "-12", 1.0),
        ("minus $12$", "12", 0.0),
        ("-$12$", "12", 0.0),
        ("- $12$", "12", 0.0),
        ("negative twelve", "12", 0.0),
        ("half of 12", "12", 0.0),
        ("half of $12$", "12", 0.0),
        ("half of \\boxed{12}", "12", 0.0),
        ("the square root of $12$", "12", 0.0),
        ("12 and a half", "12", 0.0),
        ("$12$ and a half", "12", 0.0),
        ("12 over 5", "12", 0.0),
        ("$12$ over $5$", "5", 0.0),
        ("less than 12", "12", 0.0),
        ("12 squared", "12", 0.0),
        ("12 sin", "12", 0.0),
        ("2 to 3", "2", 0.0),
        ("2 or three", "2", 0.0),
        ("5 hours 30 minutes", "5", 0.0),
        ("5 hours 30 minutes", "530", 0.0),
        ("6 feet 2 inches", "2 feet 6 inches", 0.0),
        ("3 R 2", "2 R 3", 0.0),
        ("2023-01-05", "2023-02-04", 0.0),
        ("3 x 10^4", "30000", 1.0),
        ("2t", "2", 0.0),
        ("12!", "12", 0.0),
        ("5!", "120", 1.0),
        ("$2\\boxed{12}$", "12", 0.0),
        ("$\\frac{1}{2}\\boxed{12}$", "12", 0.0),
        ("12 thirds", "12", 0.0),
        ("12\\text{ million}", "12", 0.0),
        ("$3$, not $4$", "4", 0.0),
        ("The roots are $1$ and $2$.", "1, 2", 1.0),
        ("\\frac{3}{2}\\text{ hours}", "1.5", 1.0),
        ("3π cm", "3\\pi", 1.0),
        ("The area is $5\\text{ cm}^2$.", "5", 1.0),
        ("We find $x=1$, so the answer is $\\boxed{3}$.", "3", 1.0),
        ("\\boxed{5} or \\boxed{6}", "6", 0.0),
        ("Natalia sold 48/2 = 24 clips.\nIn all 48+24 = 72.\n#### 72", "72", 1.0),
        ("72", "Natalia sold 48/2 = 24 clips.\nIn all 48+24 = 72.\n#### 72", 1.0),
        ("24", "Natalia sold 48/2 = 24 clips.\nIn all 48+24 = 72.\n#### 72", 0.0),
    ],
)
def test_a_number_is_read_with_all_that_changes_it(verifier, answer, solution, right):
    assert verifier.check(answer, {"solution": solution}) == right
    assert verifier.failures == 0


@pytest.mark.parametrize(
    ("answer", "solution", "right"),
    [
        ("4\\sqrt(2)", "4", 0.0),
        ("4\\sqrt(2)", "4\\sqrt{2}", 1.0),
        ("2^{-98}", "2^{-99}", 0.0),
        ("2^{-98}", "\\frac{1}{2^{98}}", 1.0),
        ("x = 2^{-98}", "x = 2^{-99}", 0.0),
        ("2^{-98}x", "2^{-99}x", 0.0),
        ("\\{1, 2^{-98}\\}", "\\{1, 2^{-99}\\}", 0.0),
        ("1 + 2^{-98}", "1 + 2^{-99}", 0.0),
        ("\\frac{1}{2006!}", "\\frac{1}{2004!}", 0.0),
        ("\\frac{1}{2006!}", "\\frac{1}{2006 \\cdot 2005!}", 1.0),
        ("10^{-8}", "0", 0.0),
        ("10^{-8}", "0.00000002", 0.0),
        ("1e-12", "2e-12", 0.0),
        ("1e-12", "10^{-12}", 1.0),
        ("6.02e23", "6.02 \\times 10^{23}", 1.0),
        ("x^2 = -1", "x^2 = -2", 0.0),
        ("x + y = 1", "2x + 2y = 2", 1.0),
        ("0.0000001", "2 \\cdot 10^{-7}", 0.0),
        ("\\sqrt{5 + 2\\sqrt{6}}", "\\sqrt{2} + \\sqrt{3}", 1.0),
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", 1.0),
        ("\\tan\\frac{3\\pi}{11} + 4\\sin\\frac{2\\pi}{11}", "\\sqrt{11}", 1.0),
        ("\\tan\\frac{3\\pi}{11} + 4\\sin\\frac{2\\pi}{11}", "\\sqrt{11} + 10^{-40}", 0.0),
        ("0.3333333", "\\frac{1}{3}", 1.0),
        ("50\\%", "0.5", 1.0),
        ("50 percent", "\\frac{1}{2}", 1.0),
        ("0.5", "50%", 1.0),
        ("50%", "50", 1.0),
        ("50%", "5", 0.0),
        ("cos(x)", "\\cos(x)", 1.0),
        ("e^{16} - 1", "-1 + exp(16)", 1.0),
        ("0.1+0.2", "0.3", 1.0),
    ],
)
def test_values_are_compared_exactly(verifier, answer, solution, right):
    assert verifier.check(answer, {"solution": solution}) == right
    assert verifier.failures == 0


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


@pytest.mark.parametrize(
    ("answer", "solution", "right"),
    [
        ("42", "42", 1.0),
        ("$42", "42", 1.0),
        ("\\$42", "42", 1.0),
        ("**42**", "42", 1.0),
        ("-16", "16", 0.0),
        ("16", "-16", 0.0),
        ("1,200", "1200", 1.0),
        ("$1,200", "1200", 1.0),
        ("1,200", "1", 0.0),
        ("4*3 = 12", "12", 1.0),
        ("4*3 = 12", "4", 0.0),
    ],
)
def test_a_word_problem_has_one_number_with_its_sign(verifier, answer, solution, right):
    row = {**load_rows("reasoning_gym/gsm_symbolic", size=1).rows[0], "solution": solution}
    assert kind_of(row) == "math" and verifier.check(answer, row) == right


def test_a_game_of_life_halts_or_does_not(verifier):
    row = load_rows("reasoning_gym/game_of_life_halting", size=1).rows[0]
    answers = {row["solution"]: 1.0, str(row["solution"] != "True"): 0.0, "perhaps": 0.0}
    assert {answer: verifier.check(answer, row) for answer in answers} == answers


def test_a_check_of_a_generator_that_is_replaced_is_refused():
    row = load_rows("reasoning_gym/gsm_symbolic", size=1).rows[0]
    with pytest.raises(ValueError, match="check of gsm_symbolic is not used: math is"):
        is_for_generator("1", row)
    with pytest.raises(ValueError, match="verifier=generator: row 1"):
        check_rows("generator", [row])


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
    weights = {"answer_weight": 1.0, "format_weight": 0.1, "length_weight": 0.5}
    config = VerifiedRewardConfig(**weights, length_free=10, verifier="exact", verifier_limit_s=1.0)
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
