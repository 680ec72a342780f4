"""Rules of quality, by kind."""

from rlt.preparation.record import Dropped, Record
from rlt.preparation.stage import RowStage


class Quality(RowStage):
    """Rules of quality, by kind."""

    name = "quality"

    def one(self, record: Record) -> Record | Dropped:
        return record
