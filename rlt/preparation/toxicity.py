"""How toxic a record is."""

from rlt.preparation.record import Dropped, Record
from rlt.preparation.stage import RowStage


class Toxicity(RowStage):
    """How toxic a record is."""

    name = "toxicity"

    def one(self, record: Record) -> Record | Dropped:
        return record
