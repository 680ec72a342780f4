"""A number as people write it: `12 dollars`, `€5`, `3 1/2`, `3 million`, `about 12`, `minus 12`, `42 (forty-two)`.

As a formula its letters would be multiplied, or fall away. They are read here; and where they may make another number
of the one they stand beside (`half of 12`, `12 over 5`, `5 hours 30 minutes`), there is no amount.
"""

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from unicodedata import normalize

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SPELLED = {
    **{one: number for number, one in enumerate(ONES)},
    **{ten: 10 * tens for tens, ten in enumerate(TENS, 2)},
    **{f"{ten}-{ONES[one]}": 10 * tens + one for tens, ten in enumerate(TENS, 2) for one in range(1, 10)},
}
SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
PARTS = frozenset(
    f"{part}{s}"
    for part in ("third", "quarter", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "hundredth")
    for s in ("", "s")
)
# Words that make another number of the one they stand beside.
CHANGING = frozenset(
    [
        *("minus", "negative", "plus", "over", "under", "below", "less", "not", "without", "except", "divided"),
        *("multiplied", "squared", "cubed", "root", "factorial", "choose", "mod", "modulo", "remainder", "half"),
        *("halves", "double", "triple", "twice", "thrice", "opposite", "inverse", "reciprocal", "percent", "pct"),
        *("percentage", *SCALES, *(f"{scale}s" for scale in SCALES)),
    ]
)
FUNCTIONS = frozenset(
    [
        *("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", "asin"),
        *("acos", "atan", "log", "ln", "exp", "sqrt", "frac", "lim", "max", "min", "gcd", "lcm", "mod", "det"),
    ]
)
GREEK = frozenset(
    [
        *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu"),
        *("xi", "pi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega"),
    ]
)
# What no noun or unit has in it.
NO_UNIT = (
    CHANGING | PARTS | (FUNCTIONS - {"min", "sec"}) | (GREEK - {"psi"}) | SPELLED.keys() | {"or", "than", "infinity"}
)
# One word in several spellings.
SAME_UNIT = {"€": "euro", "eur": "euro", "£": "pound", "gbp": "pound", "¥": "yen", "jpy": "yen", "₹": "rupee"}

# What may stand before a number without a change to it.
LEAD = (
    r"(?i:(?:(?:the|final|answer|result|total|value|amount|is|are|was|were|be|equals?|about|approximately|approx\.?|"
    r"around|roughly|exactly|it|there|we|get|have|has|so|thus|hence|therefore|costs?|in all|(?:a )?total of|sum of)"
    r"[:,]?\s+|(?:answer|is):\s*|[≈~=]\s*)*)"
)
CURRENCY = r"(?:[$€£¥₹]\s*)?"
SIGN = r"(?:(?P<sign>[-−+]|(?i:minus|negative)\s)\s*)?"
GROUPED = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)"
NUMBER = (
    rf"(?:(?:(?P<whole>\d+)\s+)?(?P<part>\d+\s*/\s*0*[1-9]\d*)"
    rf"|(?P<plain>(?:{GROUPED}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}})?))"
)
SCALE = rf"(?:\s+(?P<scale>(?i:{'|'.join(SCALES)}))s?\b)?"
PERCENT = r"(?:\s*(?P<percent>\\?%|(?i:percent|percentage|pct)\b))?"
SHORT = "[mgslhJNWVAKL]|cm|mm|km|nm|kg|mg|lb|oz|ft|in|yd|mi|hr|ms|mL|ml|kJ|Hz|kW|Pa|GB|MB|kB|TB|am|pm|pt|°[CF]?"
JOINED = "cm|mm|km|nm|kg|mg|lbs?|ft|mph|mL|ml|kJ|Hz|kHz|MHz|GHz|kW|kWh|GB|MB|kB|TB|hrs?|mins?|secs?|°[CF]"
POWER = r"(?:\^\{?-?\d\}?|[²³])?"
UNIT = (
    rf"(?:\s+(?:{SHORT}|[^\W\d_]{{3,}})|(?:{JOINED}))(?![^\W\d_]){POWER}"
    rf"(?:(?:\s*/\s*|\s+|-|·)[^\W\d_]+(?:'s)?{POWER})*"
)
ASIDE = r"(?:\s*\((?P<aside>[^()\d]+)\))?"
AMOUNT = re.compile(
    rf"{LEAD}(?P<currency>{CURRENCY}){SIGN}{CURRENCY}{NUMBER}{SCALE}{PERCENT}"
    rf"(?P<unit>{UNIT})?{ASIDE}\s*\.?"
)
WORD = re.compile(r"[^\W\d_]+")
# ½ and its like; superscripts have the same kind of plain form, and are not meant.
VULGAR = re.compile("[¼-¾⅐-⅞]")
SIX_PLACES = Fraction(1, 10**6)
HUNDREDTHS = "%"


@dataclass(frozen=True)
class Amount:
    """A number and what is counted.

    Attributes:
        value: exactly what is written.
        kind: "whole", "fraction" where it has a stroke, "decimal" where it has a point.
        formula: the number in LaTeX.
        unit: as `unit_of` gives it; empty where there is none.
    """

    value: Fraction
    kind: str
    formula: str
    unit: str


def read_amount(text: str) -> Amount | None:
    """The amount that a text is, as a whole; None for any other text."""
    found = AMOUNT.fullmatch(bare(text))
    if found is None or not _is_aside(found):
        return None
    unit = HUNDREDTHS if found["percent"] else unit_of(found["unit"] or found["currency"].strip(" $"))
    if unit is None:
        return None
    sign = 1 if (found["sign"] or "+").strip() == "+" else -1
    scale = SCALES[found["scale"].casefold()] if found["scale"] else 1
    if found["part"]:
        part = Fraction(re.sub(r"\s", "", found["part"]))
        if found["whole"] and part >= 1:  # `1 234/5` may be 1234/5
            return None
        return _amount(sign * scale * (int(found["whole"] or 0) + part), "fraction", unit)
    plain = re.sub("[, ]", "", found["plain"])
    amount = _amount(sign * scale * Fraction(Decimal(plain)), "decimal", unit)
    mantissa, _, exponent = plain.casefold().partition("e")
    if scale > 1 or (amount.kind == "whole" and not exponent):
        return amount
    power = rf" \times 10^{{{int(exponent)}}}" if exponent else ""
    return replace(amount, formula=f"{'-' if sign < 0 else ''}{mantissa}{power}")


def _amount(value: Fraction, kind: str, unit: str) -> Amount:
    if value.denominator == 1:
        return Amount(value, "whole", str(value), unit)
    sign = "-" if value < 0 else ""
    return Amount(value, kind, rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}", unit)


def _is_aside(found: re.Match) -> bool:
    """Whether what stands in parentheses behind a number, if anything, says the same again or nothing of numbers."""
    aside = (found["aside"] or "").casefold().strip()
    if aside in SPELLED:
        return found["plain"] == str(SPELLED[aside]) and not found["scale"]
    return not NO_UNIT & set(WORD.findall(aside))


def unit_of(text: str) -> str | None:
    """A unit or noun in one of its spellings, to be compared; None where it may change the number before it."""
    words = WORD.findall(text.casefold())
    if NO_UNIT & set(words) or (words and words[-1] in ("square", "cube")):
        return None
    unit = " ".join(text.casefold().split()).rstrip(".")
    return SAME_UNIT.get(unit, unit[:-1] if unit.endswith("s") and len(unit) > 2 else unit)


def is_same_amount(answer: Amount, solution: Amount) -> bool:
    """Equal numbers; a fraction also equals its decimals, from six digits and six places on. A unit is compared where
    both have one. A percentage equals what it is of 1, and the number of its percents."""
    if answer.unit and solution.unit and answer.unit != solution.unit:
        return False
    values = [answer.value]
    if HUNDREDTHS in (answer.unit, solution.unit) and answer.unit != solution.unit:
        values.append(answer.value / 100 if answer.unit else answer.value * 100)
    if {answer.kind, solution.kind} != {"decimal", "fraction"}:
        return solution.value in values
    gaps = [abs(value - solution.value) for value in values]
    return any(gap <= SIX_PLACES / 2 and gap <= abs(solution.value) * 5 * SIX_PLACES for gap in gaps)


def bare(text: str) -> str:
    """Without what only says that mathematics stands here, and with the plain form of what has several."""
    text = text.rpartition("####")[2]  # GSM8K's mark of an answer
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:text\w*|math(?:rm|bf|it)|mbox)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"(?<=\d)\\,(?=\d)", ",", text.replace("\\!", "").replace("{,}", ","))
    text = re.sub(r"\\[,;: ]|(?<=\w)~", " ", text)
    text = VULGAR.sub(lambda found: f" {plain_fraction(found[0])}", text)
    return re.sub(r"\\[\[\]()]|\\?\$", "", text).strip("* \t\r\n")


def plain_fraction(character: str) -> str:
    """`1/2` for ½."""
    return normalize("NFKC", character).replace("⁄", "/")
