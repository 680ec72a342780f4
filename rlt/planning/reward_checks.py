"""What a configuration alone can tell of rewards: lists of reductions, verifiers, functions, weights.

Each raises a `Refused` of one line.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

from rlt.errors import Refused
from rlt.schema import (
    DistillSettings,
    EvaluateSettings,
    GRPOSettings,
    RewardOptions,
    StudentSettings,
    TeacherRewardConfig,
    TeacherSettings,
    VerifierKeys,
)

REDUCTIONS = ("mean", "sum", "min", "max", "median", "first_quartile", "last_quartile", "top_share", "log_sum_exp")
VERIFIERS = ("auto", "math", "expression", "exact", "choice", "generator")
NORMALIZERS = ("none", "exp", "exp_norm")
# The functions of rewards/verified.py, in their order, and the keys of their weights.
VERIFIED = {"answer_reward": "answer_weight", "format_reward": "format_weight", "length_penalty": "length_weight"}


def check_reward_weights(settings: GRPOSettings, weights: Sequence[Any]) -> None:
    """One number for each reward function, in the order in which trainers/build.py adds them."""
    named = ["teacher_reward"] if isinstance(settings, TeacherSettings) else []
    named += [path.rpartition(".")[2] for path in settings.reward_functions or []]
    named += [function for function, key in VERIFIED.items() if getattr(settings.verified, key, None)]
    if len(weights) != len(named) or not all(_is_number(weight) for weight in weights):
        raise Refused(
            f"reward_weights={list(weights)} must be {len(named)} number{'s' * (len(named) > 1)}, for "
            f"{', '.join(named)}"
        )


def check_verifier(settings: VerifierKeys | StudentSettings | EvaluateSettings | DistillSettings) -> None:
    if settings.verifier not in VERIFIERS:
        raise Refused(f"verifier={settings.verifier}: use one of {', '.join(VERIFIERS)}")
    for key in ("verifier_limit_s", "length_free"):
        if getattr(settings, key, 1) <= 0:
            raise Refused(f"{key}={getattr(settings, key)} must be positive")


def check_functions(paths: list[str] | None) -> None:
    """Dotted paths must name a module that exists; the function itself is looked up when the run is built."""
    if not paths:
        raise Refused("reward_functions is empty: name at least one function, such as rlt.rewards.exact.exact_answer")
    for path in paths:
        module, _, function = path.rpartition(".")
        try:
            found = bool(module and function) and importlib.util.find_spec(module.split(".")[0]) is not None
        except ValueError:
            found = False
        if not found:
            raise Refused(f"reward_functions: {path!r} is not a dotted path to a function that can be imported")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def check_reward(settings: TeacherRewardConfig) -> None:
    """Reductions, coefficients and normalisers of the teacher reward; used by score.py as well."""
    for names_key, coefficients_key in (
        ("reduction_log_prob_fn", "answer_log_prob_coeff"),
        ("reduction_kl_fn", "kl_penalty_reward_coeff"),
    ):
        names, coefficients = getattr(settings, names_key), getattr(settings, coefficients_key)
        for name in names:
            if name not in REDUCTIONS:
                raise Refused(f"{names_key}: {name!r} is not a reduction; use {', '.join(REDUCTIONS)}")
        if len(names) != len(coefficients) or not names:
            raise Refused(
                f"{coefficients_key}={coefficients} and {names_key}={names} must be of one length, at least 1"
            )
        if not all(_is_number(value) for value in coefficients):
            raise Refused(f"{coefficients_key}={coefficients} must hold numbers only")
    for key in ("normalize_log_prob_fn", "normalize_kl_fn"):
        if getattr(settings, key) is not None and getattr(settings, key) not in NORMALIZERS:
            raise Refused(f"{key}={getattr(settings, key)!r}: use null or one of {', '.join(NORMALIZERS)}")
    if settings.unbias_student_log_probs_temp <= 0:
        raise Refused(f"unbias_student_log_probs_temp={settings.unbias_student_log_probs_temp} must be above 0")


def check_reward_options(settings: RewardOptions) -> None:
    """How answers and results are checked that the reward asks for."""
    for part in (settings.generated, settings.gate):
        if part is not None:
            check_verifier(part)
    if settings.gate is not None and settings.gate.missing_result not in ("right", "wrong"):
        raise Refused(f"missing_result={settings.gate.missing_result}: use right or wrong")
