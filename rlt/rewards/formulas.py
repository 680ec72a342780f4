"""Whether two texts are the same mathematics: read as LaTeX by math-verify, as a whole, and compared exactly.

math-verify reads the last part of a text that it can, strips what may be a unit, drops differences below 1e-15 and
rounds decimals to six places. So a part of an answer would be taken for all of it (`4\\sqrt(2)` for 4), `2^{-98}` for
`2^{-99}`, `2t` for 2. Here a text that is not read as a whole equals no other.
"""

import re
from functools import cache
from typing import Any, NamedTuple

from rlt.rewards.amounts import (
    CHANGING,
    FUNCTIONS,
    GREEK,
    HUNDREDTHS,
    LEAD,
    PARTS,
    UNIT,
    VULGAR,
    WORD,
    Amount,
    is_same_amount,
    plain_fraction,
    read_amount,
    unit_of,
)

PI = re.compile(r"(?<![\\\w])pi(?!\w)")
PYTHON_POWER = re.compile(r"(?<=[\w)])(?:\*\*| \*\* )(?=[\w(-])")
TIMES_TEN = re.compile(r"(?<=\d)\s*x\s*(?=10\s*\^)")  # `3 x 10^4`
SIGNS = str.maketrans(
    {
        "−": "-",
        "×": r"\times ",
        "÷": r"\div ",
        "·": r"\cdot ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "≤": r"\leq ",
        "≥": r"\geq ",
        "∪": r"\cup ",
        "±": r"\pm ",
        "²": "^2",
        "³": "^3",
    }
)
# A function's name that is no LaTeX command: as letters it would be multiplied.
NAME = re.compile(r"(?<![\\\w])((?:arc)?(?:sin|cos|tan)|cot|sec|csc|sinh|cosh|tanh|log|ln|exp)(?=\s*\()")
ROOT = re.compile(r"(?:√|\\sqrt(?=\s*\())\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|[A-Za-z]))")
BRACED = r"\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}"
BOXED = rf"\\boxed\s*{BRACED}"
# Where mathematics is set apart from the text around it.
MARKED = re.compile(rf"\$\$.+?\$\$|\$[^$\n]+\$|\\\(.+?\\\)|\\\[.+?\\\]|{BOXED}", re.DOTALL)
JOINED_BY = re.compile(r"\s*(?:,\s*(?:and|or)?|and|or)\s*", re.IGNORECASE)
GOES_ON = r"[-+*/^×÷√!<>≤≥\d]"  # right beside: what is set apart is an operand
# A word right before what is set apart, which makes another value of it; the only word there; the words before `of`.
BEFORE = CHANGING | {"times", "than"}
ALONE = {"to", "by", "r", "remainder", "x"}
OF = re.compile(
    rf"\b(?:{'|'.join(sorted(PARTS))}|root|inverse|opposite|reciprocal|negative|half|halves|logarithm|factorial) of\s*$"
    r"|\b(?:divided|multiplied) by\s*$",
    re.IGNORECASE,
)
RIGHT_BEHIND = CHANGING | {"times", "or"}
BEHIND = PARTS | {"half"}  # among the next three words: `$12$ and a half`
PERCENT = {"percent", "percentage", "pct"}  # which math-verify reads
PERCENT_BEHIND = re.compile(rf"\s*(?:\\?%|(?:{'|'.join(PERCENT)})\b)")
COMMAND = re.compile(r"\\(?:text\w*|math\w+|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
# What a formula may have that is no LaTeX command.
KNOWN = FUNCTIONS | GREEK | PERCENT | {"infinity", "inf", "and", "or", "x", "e"}
BETWEEN_NUMBERS = re.compile(r"\d\s*([^\W\d_]+)\s*(?=\d)")
DATE = re.compile(r"(?<!\d)\d{4}-\d\d-\d\d(?!\d)")  # a difference of three numbers
TEXT_BEHIND = re.compile(
    r"(?<=\S)(?:\s|\\[,;: ])*\\(?:text\w*|mathrm|mbox)\s*\{(?P<unit>[^{}]*)\}(?:\^\{?-?\d\}?)?\s*\.?$"
)
UNIT_BEHIND = re.compile(rf"(?:(?<=[\d)}}π])|(?<=\\pi))(?P<unit>{UNIT})\.?$")
RELATIVE = 1e-5  # of values with a decimal among them: about what six places are
DIGITS = 10_000  # to which numbers without a decimal are told apart


class Reading(NamedTuple):
    """What a text says: `formula` in LaTeX, without the unit behind it; `whole` has the unit in it."""

    amount: Amount | None
    formula: str
    unit: str
    whole: str


def is_same(answer: str, solution: str) -> bool:
    """Equal in value; a list of numbers is a set. A unit is compared where both have one."""
    given, gold = read(answer), read(solution)
    if given is None or gold is None:
        return False
    if given.amount and gold.amount:
        return is_same_amount(given.amount, gold.amount)
    if given.unit and gold.unit and given.unit != gold.unit:
        return False
    pairs = dict.fromkeys([(given.formula, gold.formula), (given.whole, gold.whole)])
    return any(_is_same_formula(*pair) for pair in pairs)


def is_readable(text: str) -> bool:
    """Whether the text is an amount, or a formula as a whole."""
    found = read(text)
    if found is None or found.amount:
        return found is not None
    forms = _parsed(found.formula) + _parsed(found.whole)
    return any(not isinstance(form, str) for form in forms)  # a string alone is what it could not read


def read(text: str) -> Reading | None:
    """What a text says; None where what stands around its mathematics may make another value of it."""
    text = text.replace("\\$", "").strip("* \t\r\n")
    apart = text if (amount := read_amount(text)) else _set_apart(text)
    if apart is None:
        return None
    amount = amount or read_amount(apart)
    if amount is None:
        return Reading(None, *_without_unit(apart), apart)
    whole = rf"\frac{{{amount.formula}}}{{100}}" if amount.unit == HUNDREDTHS else apart
    return Reading(amount, amount.formula, amount.unit, whole)


def _set_apart(text: str) -> str | None:
    """The mathematics of a text in words, which is what is boxed, or comes last; of a solution in words without marks,
    the last line. None as in `read`."""
    text = _unwrapped(text)
    marks = list(MARKED.finditer(text))
    if not marks:
        lines = text.splitlines()
        return lines[-1].lstrip("# ") if len(lines) > 1 and _is_prose(text) else text
    boxed = [number for number, mark in enumerate(marks) if "\\boxed" in mark[0]]
    chosen = boxed[-1] if boxed else len(marks) - 1
    before, behind = text[: marks[chosen].start()], text[marks[chosen].end() :]
    if chosen:
        before = before[marks[chosen - 1].end() :]
        if JOINED_BY.fullmatch(before):  # the roots of an equation, which math-verify takes together
            return text
    if _is_changed(before.replace("**", ""), behind.replace("**", ""), chosen > 0):
        return None
    inner = _unwrapped(marks[chosen][0])
    if MARKED.search(inner) and len(inner) < len(text):
        return _set_apart(inner)
    return rf"{inner}\%" if PERCENT_BEHIND.match(behind) else inner


def _unwrapped(text: str) -> str:
    """What a text holds that is one formula set apart."""
    found = MARKED.match(text)
    if found is None or text[found.end() :].strip() not in ("", "."):
        return text
    whole = found[0]
    if whole.startswith("\\boxed"):
        return _unwrapped(whole.partition("{")[2][:-1].strip())
    width = 1 if whole[0] == "$" and whole[1] != "$" else 2
    return _unwrapped(whole[width:-width].strip())


def _is_changed(before: str, behind: str, follows: bool) -> bool:
    """Whether what stands beside a formula makes another value of it: `half of $12$`, `-$12$`, `$12$ over $5$`.

    Args:
        before: the text up to it, from the formula before it where it `follows` one.
    """
    if re.search(rf"(?:{GOES_ON}\s*|[)}}}}])$", before) or re.match(rf"\s*{GOES_ON}", behind) or OF.search(before):
        return True
    words = WORD.findall(before.casefold())
    if follows and (not before.strip() or (len(words) == 1 and words[0] in ALONE)):
        return True
    if words and words[-1] in BEFORE - PERCENT:
        return True
    clause = WORD.findall(re.split("[.:;,\n]", behind)[0].casefold())[:3]
    return bool(clause) and (clause[0] in RIGHT_BEHIND - PERCENT or not BEHIND.isdisjoint(clause))


def _without_unit(text: str) -> tuple[str, str]:
    """A formula and the unit behind it; without a unit, the formula and nothing."""
    found = TEXT_BEHIND.search(text) or UNIT_BEHIND.search(text)
    formula, unit = text, None
    if found and re.search(r"\d|\\pi|π", text[: found.start()]) and not MARKED.search(text):
        unit = unit_of(found["unit"])
        formula = text if unit is None else text[: found.start()]
    return re.sub(rf"^{LEAD}", "", formula), unit or ""


def _is_same_formula(answer: str, solution: str) -> bool:
    given, gold = _parsed(answer), _parsed(solution)
    # Without time limits of its own, which need the main thread's alarm: the process has one.
    return bool(given and gold) and _library()[1](gold, given, timeout_seconds=None)


def _parsed(text: str) -> list:
    """What math-verify makes of the text, a formula and its LaTeX; nothing where that would be a part of it."""
    if not MARKED.search(text) and _is_prose(text):
        return []
    return _library()[0](as_latex(text))


def _is_prose(text: str) -> bool:
    """Whether the text has words, whose letters would be multiplied: `6 feet 2 inches` would be `2 feet 6 inches`; or a
    date, whose numbers would be subtracted."""
    text = COMMAND.sub(" ", text)
    words = [word.casefold() for word in WORD.findall(text) if len(word) > 3] + BETWEEN_NUMBERS.findall(text.casefold())
    return not KNOWN.issuperset(words) or DATE.search(text) is not None


def as_latex(text: str) -> str:
    """The text marked as mathematics. Characters that keep it from being read are replaced: the dollar sign of a price,
    bold type, the `**` of powers, √ and its like."""
    text = PI.sub(r"\\pi", TIMES_TEN.sub(r"\\times ", PYTHON_POWER.sub("^", text))).translate(SIGNS)
    text = VULGAR.sub(lambda found: r"\frac{{{}}}{{{}}}".format(*plain_fraction(found[0]).split("/")), text)
    text = NAME.sub(r"\\\1", text)
    text = ROOT.sub(lambda found: rf"\sqrt{{{next(filter(None, found.groups()), '')}}}", text)
    return text if MARKED.search(text) else f"${text.replace('$', '')}$"


@cache
def _library() -> tuple[Any, Any]:
    """math-verify's two functions: one that reads nothing but LaTeX, and strips no units; one that compares exactly."""
    from math_verify import LatexExtractionConfig, LatexNormalizationConfig, grader, parse, verify

    normalization = LatexNormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="all")
    only_latex = [LatexExtractionConfig(normalization_config=normalization)]
    unlimited: Any = None
    numeric_eq, solve_and_compare = grader.sympy_numeric_eq, grader.sympy_solve_and_compare

    def exact(a, b, float_rounding: int, numeric_precision: int) -> bool:
        return numeric_eq(a, b, float_rounding, numeric_precision) and not _differ(a, b)

    def solved(gold, pred, float_rounding: int, numeric_precision: int) -> bool:
        return solve_and_compare(gold, pred, float_rounding, numeric_precision) and _has_solutions(gold)

    # Replaced, because no option of `verify` is exact: it compares numbers by the first, those in sets and equations
    # too; by the second any two equations without a solution would be equal.
    grader.sympy_numeric_eq, grader.sympy_solve_and_compare = exact, solved
    return lambda text: parse(text, only_latex, parsing_timeout=unlimited), verify


def _has_solutions(relation: Any) -> bool:
    from sympy import Eq, solve

    return not isinstance(relation, Eq) or bool(solve(relation, relation.free_symbols))


def _differ(a: Any, b: Any) -> bool:
    """Whether two expressions that math-verify takes for equal have different values.

    With symbols, their values at one place are compared; what differs there only in form is still found equal when
    their difference is simplified.
    """
    from math_verify.grader import is_atomic_or_pct_atomic, safe_sympy_doit
    from sympy import Float, MatrixBase, MatrixExpr, Number, PrecisionExhausted, Rational, prime

    if isinstance(a, MatrixBase | MatrixExpr):
        return False  # their elements have been compared
    with_decimals = a.has(Float) or b.has(Float)
    if not with_decimals and (is_atomic_or_pct_atomic(a, Number) or is_atomic_or_pct_atomic(b, Number)):
        return False  # these are compared exactly, but for a percentage
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    place = {symbol: Rational(prime(n + 20), prime(n + 10)) for n, symbol in enumerate(symbols)}
    sides: list[Any] = [safe_sympy_doit(side).subs(place) for side in (a, b)]
    a, b = sides
    if a == b:
        return False
    if with_decimals:
        a, b = a.evalf(), b.evalf()
        return bool(abs(a - b) > RELATIVE * max(abs(a), abs(b)))
    try:
        return (a - b).evalf(15, maxn=DIGITS, strict=True) != 0
    except PrecisionExhausted:  # nothing is left of so many digits
        return False
