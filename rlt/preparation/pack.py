"""Rows of one length."""

from rlt.preparation.record import Dropped, Record
from rlt.preparation.stage import RowStage


class Pack(RowStage):
    """Rows of one length."""

    name = "pack"

    def one(self, record: Record) -> Record | Dropped:
        return record
