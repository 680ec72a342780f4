"""Whether an answer is right: mathematics, arithmetic puzzles, multiple choice, exact text, a generator's own check.

Checks run in a separate process with a time limit each, because text that a model wrote can hang or break a parser.
An answer that could not be checked in time, or broke its checker, is wrong, and counted.
"""

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence

from rlt.data.generator import generator_tasks
from rlt.errors import Refused
from rlt.prompts.styles import ReasoningFormat
from rlt.rewards.checker import Broken, Checker, Unchecked
from rlt.rewards.expressions import work_out
from rlt.rewards.formulas import is_same

logger = logging.getLogger("rlt")

# However a model sets it: `**Answer**: 42`, `ANSWER : 42`, with a wide colon, or on the line below.
ANSWER_LINE = re.compile(r"(?<![^\W_])answer[*_]*[ \t]*[:：][*_]*\s*(\S.*)$", re.MULTILINE | re.IGNORECASE)
AROUND_A_LINE = " \t\r*$`_"  # stripped from `**Answer:** $42$`; a generator's checks take an answer as it stands
BOXED_CHOICE = re.compile(r"\\boxed\s*\{(?:\\\w+\s*\{)?[\s$*(]*([A-J])\s*[).:}]")
# As options are listed: `B) 3.2 J`.
FIRST_CHOICE = re.compile(r"\A[\s$*(]*([A-J])(?:[$*]*[).:]|\*\*|[$*\t ]*(?:\n|\Z))")
LONE_CHOICE = re.compile(r"\b(?:[A-HJ]\b|I(?=\W*\Z))|(?<=\()I(?=\))")  # not the pronoun I
WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\d\\$+*/^=<>]+", re.DOTALL)  # a text that has nothing of mathematics
AROUND_WORDS = re.compile(r"\\(?:boxed|text\w*|math\w+)|[{}$]|\*\*")
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
LIMIT_S = 1.5  # of one check: ordinary ones take up to a fifth of a second
DDP_TIMEOUT_S = 1800.0  # PyTorch's own
BATCH_LIMIT_S = 300.0
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
    """Equal in value (formulas.py); words are compared as they are."""
    solution = row["solution"]
    if is_exact(answer, row):
        return 1.0
    if WORDS.fullmatch(solution):  # whose letters would be multiplied: `post` and `stop` would be equal
        return is_exact(AROUND_WORDS.sub("", answer), {"solution": AROUND_WORDS.sub("", solution)})
    return float(is_same(answer, solution))


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
        ddp_timeout: seconds that other ranks wait for this one; a batch may take a sixth of it.
    """

    def __init__(self, kind: str = "auto", limit_s: float = LIMIT_S, ddp_timeout: float = DDP_TIMEOUT_S):
        if kind != "auto" and kind not in CHECKS:
            raise Refused(f"verifier={kind}: use auto or one of {', '.join(CHECKS)}")
        self.kind, self.limit_s, self.batch_limit_s = kind, limit_s, min(BATCH_LIMIT_S, ddp_timeout / 6)
        self.failures = 0  # checks that hung, broke, or were not begun in time
        self._checker = Checker()

    def check(self, answer: str | None, row: dict) -> float:
        """1 where an answer is right, else 0.

        Args:
            answer: None where there is none.
            row: `solution`, and for the generator's check `question`, `task` and `metadata`.
        """
        return self.check_batch([answer], [row])[0]

    def check_batch(self, answers: Sequence[str | None], rows: Sequence[dict]) -> list[float]:
        """The same of many, in `batch_limit_s` seconds at most; what is left by then is wrong unchecked."""
        found = [self._score_or_request(answer, row) for answer, row in zip(answers, rows, strict=True)]
        if any(isinstance(one, bytes) for one in found):
            self._checker.start()  # outside the batch's time
        give_up = time.monotonic() + self.batch_limit_s
        unchecked: Counter[str] = Counter()
        scores = [one if isinstance(one, float) else self._ask(one, give_up, unchecked) for one in found]
        if unchecked:
            said = ", ".join(f"{count} {reason}" for reason, count in unchecked.items())
            logger.warning("of a batch of %d answers these count as wrong unchecked: %s", len(answers), said)
        return scores

    def _score_or_request(self, answer: str | None, row: dict) -> float | bytes:
        """The score where it takes no parser, else what the checker is asked."""
        if answer is None:
            return 0.0
        kind = kind_of(row) if self.kind == "auto" else self.kind
        if kind == "exact" or is_exact(answer, row):
            return is_exact(answer, row)
        known = {key: row[key] for key in ("question", "solution", "task", "metadata") if key in row}
        return json.dumps((kind, answer[:LONGEST], known), default=str).encode()

    def _ask(self, request: bytes, give_up: float, unchecked: Counter[str]) -> float:
        left = give_up - time.monotonic()
        try:
            if left <= 0:
                raise Unchecked(f"came after the batch's {self.batch_limit_s:.0f} s")
            return self._checker.ask(request, min(self.limit_s, left))
        except Unchecked as reason:
            self.failures += 1
            if not isinstance(reason, Broken):  # an answer that is none, such as half a formula: ordinary
                unchecked[str(reason)] += 1
        return 0.0
