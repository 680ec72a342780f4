"""Rewards: `teacher.py` is the method, `exact.py` the example of a user's own function."""

from rewards.reductions import NORMALIZERS, REDUCTIONS
from rewards.teacher import Reading, Scored, TeacherReward

__all__ = ["NORMALIZERS", "REDUCTIONS", "Reading", "Scored", "TeacherReward"]
