"""What all runs of the matrix share; a copy stands in each result."""

from typing import Any

MODEL = "embedded/smollm2-135m-instruct"
# Of one step each, that has to be found: what divides what.
TASKS = (
    "reasoning_gym/fraction_simplification/max_value:12/min_factor:2/max_factor:9/styles:[plain]",
    "reasoning_gym/simple_equations/min_terms:1/max_terms:1/max_value:20",
)
# On which answering in sections is learned.
FORMAT_TASKS = ("reasoning_gym/leg_counting/min_animals:2/max_animals:2/max_instances:5",)
# Rows of each task; questions that are evaluated are in none of the others.
SIZES = {"evaluate": 80, "format": 80, "warmup": 32, "teach": 48, "collect": 96}
FIRST_DRAW = 50_000  # the generators' seeds begin here: no earlier study drew from them
NOVICE_STEPS, READER_STEPS, WARMUP_STEPS, RL_STEPS = 10, 8, 6, 20
BEST_OF = 8
TRAINED_TOKENS = 10_000  # of each student
BEGINNING_TOKENS = 5_000  # of these, of explanations, before a student that learns from its own samples
EXPLANATION_TOKENS, ANSWER_TOKENS = 96, 160  # at most
TEACHER_RATE, STUDENT_RATE, DISTILLED_RATE = 2e-5, 1e-4, 3e-5
BATCH, DISTILLED_BATCH = 32, 8  # completions of a step of GRPO, and of distillation
ANSWERS = 2  # to each question that is evaluated
OPD_LEARNS_SOLUTION = True  # behind thoughts that come to it: what holds a distilled student to its format
SEEDS = {"primary": range(8), "other": range(3), "tuning": 100}  # seeds from there on are for tuning


def copied() -> dict[str, Any]:
    """All of these by name, as JSON has them."""
    names = [name for name in globals() if name.isupper() and name != "SEEDS"]
    return {name: list(value) if isinstance(value := globals()[name], tuple) else value for name in names}
