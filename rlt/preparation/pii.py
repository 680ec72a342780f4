"""Personal data and secrets."""

from rlt.preparation.record import Dropped, Record
from rlt.preparation.stage import RowStage


class Pii(RowStage):
    """Personal data and secrets."""

    name = "pii"

    def one(self, record: Record) -> Record | Dropped:
        return record
