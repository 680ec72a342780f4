"""The order in which the first of some equal rows is the first: by source, as `sources` lists them, then by row.

A record's id says both, so that the order does not depend on how many shards there are, nor on what earlier stages
dropped. The id's hash orders what has one number.
"""

import numpy as np
import xxhash

from rlt.formats.inputs import parse_sources
from rlt.formats.record import Record
from rlt.schema import PrepareSettings

ORDER = np.dtype([("source", "<u4"), ("number", "<u8"), ("id", "<u8")])
ROWS = 2**40  # of one file, at most


class Order:
    """Says of a record where it stands."""

    def __init__(self, settings: PrepareSettings):
        self.sources = {source.name: place for place, source in enumerate(parse_sources(settings.sources))}

    def of(self, record: Record) -> tuple[int, int, int]:
        """(source, row of the source, hash of the id); a row of several files has its file's number first: 2-17."""
        *_, number, _ = record["id"].split(":")
        *file, row = map(int, number.split("-"))
        return self.sources[record["source"]], sum(file) * ROWS + row, xxhash.xxh3_64_intdigest(record["id"].encode())
