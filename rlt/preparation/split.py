"""Training and validation, by group: variants of one problem stand on one side, whatever their number."""

import xxhash

from rlt.formats.record import Dropped, Record, group_of
from rlt.preparation.stage import RowStage

TRAIN, VALIDATION = "train", "validation"
WHOLE = 2**64


class Split(RowStage):
    """Notes `meta.split`: a hash of the group decides, so that more rows, or another order, move no row."""

    name = "split"
    keys = ("validation_share", "seed")

    def one(self, record: Record) -> Record | Dropped:
        part = xxhash.xxh3_64_intdigest(group_of(record).encode(), seed=self.settings.seed) / WHOLE
        split = VALIDATION if part < self.settings.validation_share else TRAIN
        return {**record, "meta": {**record["meta"], "split": split}}
