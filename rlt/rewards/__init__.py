"""Rewards: `teacher.py` is the method, `exact.py` the example of a user's own function."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlt.rewards.reductions import NORMALIZERS, REDUCTIONS
    from rlt.rewards.teacher import Reading, Scored, TeacherReward

__all__ = ["NORMALIZERS", "REDUCTIONS", "Reading", "Scored", "TeacherReward"]


def __getattr__(name: str) -> Any:
    """Imported when asked for, because the process that checks answers has no use for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "reductions" if name.isupper() else "teacher"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
