"""Whether an answer is right: mathematics, arithmetic puzzles, multiple choice, exact text, a generator's own check.

Checks run in a separate process with a time limit each, because text that a model wrote can hang or break a parser.
An answer that could not be checked in time, or broke its checker, is wrong, and counted.
"""

import json
import multiprocessing
import os
import re
import resource
import weakref
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from rlt.data.generator import generator_tasks
from rlt.errors import Refused
from rlt.prompts.styles import ReasoningFormat
from rlt.rewards.expressions import work_out

# However a model sets it: `**Answer**: 42`, `ANSWER : 42`, with a wide colon, or on the line below.
ANSWER_LINE = re.compile(r"(?<![^\W_])answer[*_]*[ \t]*[:：][*_]*\s*(\S.*)$", re.MULTILINE | re.IGNORECASE)
AROUND_A_LINE = " \t\r*$`_"  # stripped from `**Answer:** $42$`; a generator's checks take an answer as it stands
BOXED_CHOICE = re.compile(r"\\boxed\s*\{(?:\\\w+\s*\{)?[\s$*(]*([A-J])\s*[).:}]")
# As options are listed: `B) 3.2 J`.
FIRST_CHOICE = re.compile(r"\A[\s$*(]*([A-J])(?:[$*]*[).:]|\*\*|[$*\t ]*(?:\n|\Z))")
LONE_CHOICE = re.compile(r"\b(?:[A-HJ]\b|I(?=\W*\Z))|(?<=\()I(?=\))")  # not the pronoun I
WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\d\\$+*/^=<>]+", re.DOTALL)  # a text that has nothing of mathematics
AROUND_WORDS = re.compile(r"\\(?:boxed|text\w*|math\w+)|[{}$]|\*\*")
# One number with a noun or a unit, or a currency before it: as a formula its letters would be multiplied.
AMOUNT = re.compile(
    r"(?:[^\W\d]+ )*[$€£¥₹]?\s*"
    r"(?P<number>[-−]?\d+(?:[, ]\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?)"
    r"(?:\s+(?P<unit>(?!pi\b)(?:[^\W\d_]{2,}|[mgslhJNWVAK]\b)(?:(?:/|\^| )[^\W_]+)*))?\.?"
)
PI = re.compile(r"(?<![\\\w])pi(?!\w)")
PYTHON_POWER = re.compile(r"(?<=[\w)])(?:\*\*| \*\* )(?=[\w(-])")
# Tasks whose own checks are not used, and the checks that they get instead (reasoning-gym 0.1.25). The last two are
# wrong: one takes any answer for right, the other reads the first number only, without its sign and its thousands. The
# others run the answer or the row as Python: eval, or sympy's parse_expr.
CHECKED_OTHERWISE = {
    **dict.fromkeys(("countdown", "puzzle24"), "expression"),
    **dict.fromkeys(("simple_integration", "intermediate_integration", "polynomial_multiplication"), "math"),
    **dict.fromkeys(("n_queens", "string_insertion", "spiral_matrix", "binary_matrix"), "exact"),
    **dict.fromkeys(("number_sorting", "bitwise_arithmetic"), "exact"),
    "game_of_life_halting": "exact",
    "gsm_symbolic": "math",
}
START_LIMIT_S = 120.0  # for a checker's imports
# Exceptions that libraries raise on a model's text. Any other ends the checker's process, which is then started again.
BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
HARMLESS = ("PATH", "PYTHONPATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
LIMITS = {resource.RLIMIT_AS: 8 * 2**30, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}  # of a checker's process
LONGEST = 20_000  # characters of an answer that are read


def final_answer(text: str, style: ReasoningFormat) -> str | None:
    """The answer in a student's text: inside the solution's tags, else after the last `Answer:`, else None."""
    start, end = style.solution_tags
    _, tag, rest = text.rpartition(start)
    if tag:
        return rest.partition(end)[0].strip() or None
    lines = ANSWER_LINE.findall(text)
    return lines[-1].strip(AROUND_A_LINE) or None if lines else None


def is_exact(answer: str, row: dict) -> float:
    """Equal but for case and white space."""
    return float(" ".join(answer.casefold().split()) == " ".join(row["solution"].casefold().split()))


def is_choice(answer: str, row: dict) -> float:
    """The same letter of A to J in both."""
    letter = chosen(answer)
    return float(letter is not None and letter == chosen(row["solution"]))


def chosen(text: str) -> str | None:
    """The letter that a text gives: the last in a box, else the one it starts with, else the last that stands alone."""
    found = BOXED_CHOICE.findall(text) or FIRST_CHOICE.findall(text) or LONE_CHOICE.findall(text)
    return found[-1] if found else None


def is_mathematically(answer: str, row: dict) -> float:
    """Equal in value, by math-verify, which takes a list of numbers for a set; words are compared as they are."""
    from math_verify import parse, verify

    solution = row["solution"]
    if is_exact(answer, row):
        return 1.0
    if WORDS.fullmatch(solution):  # whose letters would be multiplied: `post` and `stop` would be equal
        return is_exact(AROUND_WORDS.sub("", answer), {"solution": AROUND_WORDS.sub("", solution)})
    amounts = [AMOUNT.fullmatch(_bare(text)) for text in (answer, solution)]
    if amounts[0] and amounts[1]:
        return _is_same_amount(amounts[0], amounts[1])
    # Without time limits of its own, which need the main thread's alarm: the process has one.
    unlimited: Any = None
    gold, given = (parse(_as_latex(text), parsing_timeout=unlimited) for text in (solution, answer))
    return float(bool(gold and given) and verify(gold, given, timeout_seconds=None))


def _is_same_amount(answer: re.Match, solution: re.Match) -> float:
    """Equal numbers; a unit is compared where both have one."""
    numbers = [Decimal(re.sub("[, ]", "", found["number"]).replace("−", "-")) for found in (answer, solution)]
    units = {(found["unit"] or "").casefold().rstrip("s") for found in (answer, solution)} - {""}
    return float(numbers[0] == numbers[1] and len(units) < 2)


def _bare(text: str) -> str:
    """Without what only says that a formula stands here."""
    return re.sub(r"\\[\[\]()]", "", text).replace("\\$", "$").strip("* \n$")


def _as_latex(text: str) -> str:
    """The text marked as mathematics. Characters that keep it from being read are replaced: the dollar sign of a price,
    bold type, the `**` of powers."""
    text = PI.sub(r"\\pi", PYTHON_POWER.sub("^", text.replace("\\$", "").strip("* ")))
    return text if "$" in text else f"${text}$"


def is_expression(answer: str, row: dict) -> float:
    """Arithmetic of exactly the puzzle's numbers, which has the value of the solution."""
    value, numbers = work_out(answer)
    return float(numbers == sorted(json.loads(row["metadata"])["numbers"]) and value == work_out(row["solution"])[0])


def is_for_generator(answer: str, row: dict) -> float:
    """The task's own score of reasoning-gym, in [0, 1]; full marks only, where a task gives points for less.

    Raises:
        Refused: the task's check would run the answer, or is wrong.
    """
    if row["task"] in CHECKED_OTHERWISE:
        raise Refused(f"reasoning_gym's check of {row['task']} is not used: {CHECKED_OTHERWISE[row['task']]} is")
    import reasoning_gym

    metadata = json.loads(row["metadata"])
    task = reasoning_gym.create_dataset(row["task"], seed=0, size=1, **metadata.pop("task_options", {}))
    entry = {"question": row["question"], "answer": row["solution"], "metadata": metadata}
    return float(task.score_answer(answer, entry) >= 1.0)


CHECKS: dict[str, Callable[[str, dict], float]] = {
    "math": is_mathematically,
    "exact": is_exact,
    "choice": is_choice,
    "expression": is_expression,
    "generator": is_for_generator,
}


def kind_of(row: dict) -> str:
    """The check that fits a row: the check of its task, `choice` for a letter, `math` for everything else."""
    if row.get("metadata") and row.get("task") in generator_tasks():  # else the two columns are the user's own
        return CHECKED_OTHERWISE.get(row["task"], "generator")
    return "choice" if re.fullmatch(r"\(?[A-J]\)?\.?", row["solution"].strip()) else "math"


def check_rows(kind: str, rows: list[dict]) -> None:
    """Refuse rows that a named check cannot be used on.

    Raises:
        Refused: rows are to be checked by a generator that they do not name, or whose check is not used, or as
            puzzles of numbers that they do not have.
    """
    if kind not in ("generator", "expression"):
        return
    for number, row in enumerate(rows, start=1):
        if kind_of(row) != kind:
            raise Refused(
                f"verifier={kind}: row {number} (task {row.get('task')}) has nothing that this check can use; "
                "verifier=auto takes another for such rows"
            )


class Verifier:
    """Checks answers in a process of its own, which starts with the first and ends with this object.

    Args:
        kind: one of `CHECKS`, or "auto": by row.
        limit_s: of one check.
    """

    def __init__(self, kind: str = "auto", limit_s: float = 5.0):
        if kind != "auto" and kind not in CHECKS:
            raise Refused(f"verifier={kind}: use auto or one of {', '.join(CHECKS)}")
        self.kind, self.limit_s = kind, limit_s
        self.failures = 0  # checks that hung or broke
        self._process: Any = None  # with its pipe and what ends both, once the first answer is checked
        self._pipe: Any = None
        self._end: Any = None

    def check(self, answer: str | None, row: dict) -> float:
        """1 where an answer is right, else 0.

        Args:
            answer: None where there is none.
            row: `solution`, and for the generator's check `question`, `task` and `metadata`.
        """
        if answer is None:
            return 0.0
        kind = kind_of(row) if self.kind == "auto" else self.kind
        if kind == "exact" or is_exact(answer, row):
            return is_exact(answer, row)
        self._start()
        known = {key: row[key] for key in ("question", "solution", "task", "metadata") if key in row}
        try:
            self._pipe.send((kind, answer[:LONGEST], known))
            late = not self._pipe.poll(self.limit_s)
            found = None if late else self._pipe.recv()
        except (EOFError, OSError):  # it broke so thoroughly that its process ended
            late, found = True, None
        if late:
            self._stop()
        self.failures += found is None
        return found or 0.0

    def _start(self) -> None:
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._end = weakref.finalize(self, _end, self._process, self._pipe)
        if not self._pipe.poll(START_LIMIT_S):
            raise TimeoutError(f"the verifier's process was not ready within {START_LIMIT_S:.0f} s")
        try:
            self._pipe.recv()
        except EOFError:
            raise RuntimeError("the verifier's process ended while it started; what it said stands above") from None

    def _stop(self) -> None:
        self._end()
        self._process = None


def _end(process, pipe) -> None:
    pipe.close()
    process.kill()
    process.join(START_LIMIT_S)


def _serve(pipe) -> None:
    import logging
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer's, whose end ends this process too
    for name in [name for name in os.environ if name not in HARMLESS]:
        del os.environ[name]  # keys and tokens, which no answer has to do with
    for limit, most in LIMITS.items():
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # that it has no time limit of its own is known
    import math_verify  # noqa: F401 (seconds, which no check's limit should pay)
    import reasoning_gym  # noqa: F401

    pipe.send("ready")
    while True:
        try:
            kind, answer, row = pipe.recv()
        except EOFError:
            return
        try:
            found = CHECKS[kind](answer, row)
        except BROKEN:
            found = None
        pipe.send(found)
