"""Files of records: JSON lines under zstd, written whole, equal bytes for equal rows."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from rlt.durable import written_whole

SUFFIX = ".jsonl.zst"
LEVEL = 3  # of zstd


def shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}{SUFFIX}"


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that `writing` has written."""
    import zstandard  # of the group data: what trains imports this room without it

    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
        rest = b""
        while piece := reader.read(2**20):
            *lines, rest = (rest + piece).split(b"\n")
            yield from map(orjson.loads, lines)
        assert not rest, path


class Writer:
    """Takes rows, one by one."""

    def __init__(self, stream):
        self.stream = stream

    def __call__(self, row: dict[str, Any]) -> None:
        self.stream.write(orjson.dumps(row))
        self.stream.write(b"\n")


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """A shard that is there, whole, once the block has ended; nothing of it where the block fails."""
    import zstandard

    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        written_whole(path) as aside,
        aside.open("wb") as file,
        zstandard.ZstdCompressor(level=LEVEL).stream_writer(file) as stream,
    ):
        yield Writer(stream)


def write_shard(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with writing(path) as write:
        for row in rows:
            write(row)
