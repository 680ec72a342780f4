"""The language of a record."""

from rlt.preparation.record import Dropped, Record
from rlt.preparation.stage import RowStage


class Language(RowStage):
    """The language of a record."""

    name = "language"

    def one(self, record: Record) -> Record | Dropped:
        return record
