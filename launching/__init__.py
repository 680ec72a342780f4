"""Ranks of a run on one or several machines: their environment, their watching over, their end."""

from launching.child import run_child
from launching.environment import SHARDINGS, RankPlace, rank_environment
from launching.folder_lock import folder_lock
from launching.supervisor import PREEMPTED, supervise

__all__ = ["PREEMPTED", "SHARDINGS", "RankPlace", "folder_lock", "rank_environment", "run_child", "supervise"]
