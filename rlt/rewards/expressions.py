"""Arithmetic that a model wrote, worked out without running it as a program."""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

from rlt.errors import Refused

OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
SIGNS: dict[type, Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def work_out(text: str) -> tuple[Fraction, list[int]]:
    """The value of an expression of whole numbers, + - * / and parentheses, and the numbers that stand in it, sorted.

    Raises:
        SyntaxError, ValueError: anything else stands in it.
        ZeroDivisionError: it divides by zero.
    """
    numbers: list[int] = []
    value = _value(ast.parse(text.strip(), mode="eval").body, numbers)
    return value, sorted(numbers)


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            numbers.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in SIGNS:
            return SIGNS[type(op)](_value(operand, numbers))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, numbers), _value(right, numbers))
    raise Refused(f"{ast.unparse(node)!r} is no arithmetic of whole numbers")
