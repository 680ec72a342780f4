"""Training and validation, by group: variants of one problem stand on one side, whatever their number.

The group is `meta.group`; else what is asked, so that many answers to one question stay together; else the content. Of
each the normal form counts (normal.py), whichever of them it is: a problem's own row stands beside its variants. Where
a row stands in its file, or in which file, decides nothing.
"""

import xxhash

from rlt.errors import Refused
from rlt.formats.record import Dropped, Record, content_hash, prompt_of
from rlt.preparation.normal import text_hashes
from rlt.preparation.stage import RowStage
from rlt.schema import PrepareSettings

TRAIN, VALIDATION = "train", "validation"
WHOLE = 2**64


class Split(RowStage):
    """Notes `meta.split`: a hash of the group decides, so that more rows, or another order, move no row."""

    name = "split"
    version = 2  # rows without a group stand with their question
    keys = ("validation_share", "seed")

    def check(self) -> None:
        if self.settings.validation_share == 1:
            raise Refused("validation_share=1 holds every row out: use a share below 1")

    def some(self, records: list[Record]) -> list[Record | Dropped]:
        groups = text_hashes([group_text(record) for record in records])
        return [self.placed(r, g or content_hash(r).encode()) for r, g in zip(records, groups, strict=True)]

    def placed(self, record: Record, group: bytes) -> Record:
        part = xxhash.xxh3_64_intdigest(group, seed=self.settings.seed) / WHOLE
        split = VALIDATION if part < self.settings.validation_share else TRAIN
        return {**record, "meta": {**record["meta"], "split": split}}


def sides(settings: PrepareSettings) -> tuple[str, ...]:
    """Where rows of a preparation may stand: with nothing held out there is no file for it."""
    held_out = Split.name in settings.stages and settings.validation_share
    return (TRAIN, VALIDATION) if held_out else (TRAIN,)


def group_text(record: Record) -> str:
    """What rows of one side share; empty: this record has nothing of the kind."""
    return record["meta"].get("group") or prompt_of(record) or record["text"] or ""
