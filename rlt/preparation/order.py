"""The order in which the first of some equal rows is the first: by source, as `sources` lists them, then by row.

A record's id says both, so that the order does not depend on how many shards there are, nor on what earlier stages
dropped. Rows of two files of one source can have one number: the id's hash, then the place, order those.
"""

import numpy as np
import xxhash

from rlt.preparation.inputs import parse_sources
from rlt.preparation.record import Record
from rlt.schema import PrepareSettings

ORDER = np.dtype([("source", "<u4"), ("number", "<u8"), ("id", "<u8")])


class Order:
    """Says of a record where it stands."""

    def __init__(self, settings: PrepareSettings):
        self.sources = {source.name: place for place, source in enumerate(parse_sources(settings.sources))}

    def of(self, record: Record) -> tuple[int, int, int]:
        source, number = self.sources[record["source"]], record["id"].split(":")[-2]
        assert number.isdigit(), "a record's id is source:row:hash"
        return source, int(number), xxhash.xxh3_64_intdigest(record["id"].encode())
