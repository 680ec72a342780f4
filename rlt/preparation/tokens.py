"""Token ids and loss masks."""

from rlt.preparation.record import Dropped, Record
from rlt.preparation.stage import RowStage


class Tokens(RowStage):
    """Token ids and loss masks."""

    name = "tokens"

    def one(self, record: Record) -> Record | Dropped:
        return record
