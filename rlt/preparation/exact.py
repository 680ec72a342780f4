"""Exact duplicates."""

from rlt.preparation.record import Dropped, Record
from rlt.preparation.stage import RowStage


class Exact(RowStage):
    """Exact duplicates."""

    name = "exact"

    def one(self, record: Record) -> Record | Dropped:
        return record
