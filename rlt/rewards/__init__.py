"""Rewards: `teacher.py` is the method, `exact.py` the example of a user's own function."""

from rlt.rewards.reductions import NORMALIZERS, REDUCTIONS
from rlt.rewards.teacher import Reading, Scored, TeacherReward

__all__ = ["NORMALIZERS", "REDUCTIONS", "Reading", "Scored", "TeacherReward"]
