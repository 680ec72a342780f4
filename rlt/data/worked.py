"""Worked solutions of generator tasks, written from the metadata that the generator keeps with a row.

gsm_symbolic has worked solutions of its own. Other tasks keep the numbers alone; the steps from these numbers to the
answer are written out here.
"""

from collections.abc import Callable
from math import gcd


def worked_solution(task: str, metadata: dict) -> str:
    """The way to the answer in words, empty for tasks without one."""
    write = WRITERS.get(task)
    return write(metadata).strip() if write else ""


def _chain_sum(metadata: dict) -> str:
    first, *rest = metadata["expression"].split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before, total = total, total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{before} {sign} {term} = {total}.")
    return f"Step by step: {' '.join(steps)} The result is {total}."


def _leg_counting(metadata: dict) -> str:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    legs = [count * ANIMALS[animal] for animal, count in metadata["animals"].items()]
    steps = [
        f"{count} {animal} with {ANIMALS[animal]} legs: {count} × {ANIMALS[animal]} = {count * ANIMALS[animal]}."
        for animal, count in metadata["animals"].items()
    ]
    sums = [f"{sum(legs[:i])} + {legs[i]} = {sum(legs[: i + 1])}." for i in range(1, len(legs))]
    return " ".join([*steps, *sums, f"The result is {sum(legs)}."])


def _gcd(metadata: dict) -> str:
    numbers = metadata["numbers"]
    steps = [f"The divisors of {n} are {', '.join(map(str, _divisors(n)))}." for n in numbers]
    return f"{' '.join(steps)} The largest that all have is {gcd(*numbers)}."


def _simple_equations(metadata: dict) -> str:
    from sympy import Poly, Symbol

    left, _, right = metadata["equation"].partition(" = ")
    line, total = Poly(left, Symbol(metadata["variable"])), int(right)
    slope, shift = int(line.coeff_monomial(line.gen)), int(line.coeff_monomial(1))
    if slope == 0:  # the generator's factor can vanish, and any value then solves the equation
        return ""
    steps = [f"{total} {'-' if shift > 0 else '+'} {abs(shift)} = {total - shift}."] if shift else []
    if slope != 1:
        steps.append(f"{total - shift} / {slope} = {(total - shift) // slope}.")
    return " ".join(["Step by step:", *steps, f"The result is {(total - shift) // slope}."])


def _fraction_simplification(metadata: dict) -> str:
    above, below = metadata["numerator"], metadata["denominator"]
    factor = gcd(above, below)
    steps = [f"{number} / {factor} = {number // factor}." for number in (above, below)]
    return f"Step by step: {' '.join(steps)} The result is {above // factor}/{below // factor}."


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


WRITERS: dict[str, Callable[[dict], str]] = {
    "gsm_symbolic": lambda metadata: metadata["answer_cot"],
    "chain_sum": _chain_sum,
    "leg_counting": _leg_counting,
    "gcd": _gcd,
    "simple_equations": _simple_equations,
    "fraction_simplification": _fraction_simplification,
}
