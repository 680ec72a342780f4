"""Worked solutions of generator tasks, by hand and against the generator's answers."""

import pytest

from rlt.data.sources import load_rows
from rlt.data.worked import worked_solution


def test_a_sum_is_taken_term_by_term():
    assert worked_solution("chain_sum", {"expression": "4 + 3 - 9"}) == (
        "Step by step: 4 + 3 = 7. 7 - 9 = -2. The result is -2."
    )


def test_legs_are_counted_by_animal_then_summed():
    assert worked_solution("leg_counting", {"animals": {"duck": 4, "wasp": 1}}) == (
        "4 duck with 2 legs: 4 × 2 = 8. 1 wasp with 6 legs: 1 × 6 = 6. 8 + 6 = 14. The result is 14."
    )


def test_common_divisors_are_listed():
    assert worked_solution("gcd", {"numbers": [4, 6]}) == (
        "The divisors of 4 are 1, 2, 4. The divisors of 6 are 1, 2, 3, 6. The largest that all have is 2."
    )


def test_an_equation_is_freed_of_its_constant_then_of_its_factor():
    assert worked_solution("simple_equations", {"equation": "5 - 8*e = -51", "variable": "e"}) == (
        "Step by step: -51 - 5 = -56. -56 / -8 = 7. The result is 7."
    )


def test_a_fraction_is_divided_above_and_below():
    assert worked_solution("fraction_simplification", {"numerator": 12, "denominator": 18}) == (
        "Step by step: 12 / 6 = 2. 18 / 6 = 3. The result is 2/3."
    )


def test_an_equation_that_any_value_solves_has_none():
    assert worked_solution("simple_equations", {"equation": "0 = 0", "variable": "e"}) == ""


def test_other_tasks_have_none():
    assert worked_solution("sudoku", {}) == ""


@pytest.mark.parametrize(
    "task",
    ["chain_sum", "leg_counting", "gcd", "simple_equations/max_terms:2", "fraction_simplification/styles:[plain]"],
)
def test_those_written_here_end_with_the_generators_answer(task):
    for row in load_rows(f"reasoning_gym/{task}", size=25).rows:
        assert row["reasoning_trace"].rstrip(".").endswith(row["solution"])
