"""Repair of text."""

from rlt.preparation.record import Dropped, Record
from rlt.preparation.stage import RowStage


class Clean(RowStage):
    """Repair of text."""

    name = "clean"

    def one(self, record: Record) -> Record | Dropped:
        return record
