"""Rows that hold questions of evaluations."""

from rlt.preparation.record import Dropped, Record
from rlt.preparation.stage import RowStage


class Decontamination(RowStage):
    """Rows that hold questions of evaluations."""

    name = "decontamination"

    def one(self, record: Record) -> Record | Dropped:
        return record
