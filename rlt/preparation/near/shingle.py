"""What a record is compared by: the set of its runs of five words, kept on disk for whoever looks at a pair again.

<work>/sets/00003.sets   uint64, the sets of a shard's rows one after the other, each sorted
<work>/sets/00003.info   one INFO a row: where its set ends, and what decides between two that are alike
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash

from rlt.durable import written_whole
from rlt.formats.record import Record, turns_of
from rlt.preparation.order import ORDER, Order
from rlt.preparation.words import Hashes, shingles, words

WORDS = 5
INFO = np.dtype(
    [("end", "<u8"), ("size", "<u4"), ("group", "<u8"), ("unlicensed", "u1"), ("length", "<u4")] + ORDER.descr
)
UNASKED = ("system", "developer")  # what all rows of a tool's or a persona's data share


def compared_text(record: Record) -> str:
    """All that is said: not system prompts and tools, which make strangers alike."""
    if record["kind"] == "text":
        return record["text"]
    turns = [turn for turn in turns_of(record) if turn["role"] not in UNASKED]
    return "\n\n".join(part for turn in turns for part in _said(turn))


def _said(turn: dict) -> Iterator[str]:
    yield from filter(None, (turn["thinking"], turn["content"]))
    for call in turn["tool_calls"] or ():
        yield f"{call['name']} {call['arguments']}"


def info_of(record: Record, text: str, order: Order) -> tuple:
    """An INFO without `end` and `size`. Group 0: the record is in none."""
    group = record["meta"].get("group")
    key = xxhash.xxh3_64_intdigest(str(group).encode()) or 1 if group else 0
    return key, record["license"] is None, min(len(text), 2**32 - 1), *order.of(record)


def preferred(info: np.ndarray) -> list[np.ndarray]:
    """Keys of np.lexsort that put the best first: a known licence, then the longest, then the earliest."""
    return [info["id"], info["number"], info["source"], -info["length"].astype(np.int64), info["unlicensed"]]


class SetsWriter:
    """Appends rows' sets, in order."""

    def __init__(self, sets, info):
        self.sets, self.info, self.end = sets, info, 0

    def __call__(self, sets: list[np.ndarray], infos: list[tuple]) -> None:
        rows = np.empty(len(sets), INFO)
        rows["size"] = [len(one) for one in sets]
        rows["end"] = self.end + np.cumsum(rows["size"], dtype=np.uint64)
        names = [name for name in INFO.names or () if name not in ("end", "size")]
        for name, values in zip(names, zip(*infos, strict=True), strict=True):
            rows[name] = values
        self.end = int(rows["end"][-1])
        self.sets.write(np.concatenate(sets).tobytes())
        self.info.write(rows.tobytes())


@contextmanager
def writing_sets(folder: Path, number: int) -> Iterator[SetsWriter]:
    """The sets of a shard's rows; they are there, whole, once the block has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        written_whole(folder / f"{number:05d}.sets") as sets_aside,
        written_whole(folder / f"{number:05d}.info") as info_aside,
        sets_aside.open("wb") as sets,
        info_aside.open("wb") as info,
    ):
        yield SetsWriter(sets, info)


class Sets:
    """The sets of a run's rows, as SetsWriter left them; files are mapped, not read, and `forget` lets go of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.maps: list[mmap.mmap] = []
        self.opened: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def shard(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """All sets, and their INFO."""
        if number not in self.opened:
            sets, info = (self.folder / f"{number:05d}.{kind}" for kind in ("sets", "info"))
            self.opened[number] = self._mapped(sets, np.dtype("<u8")), self._mapped(info, INFO)
        return self.opened[number]

    def _mapped(self, path: Path, dtype: np.dtype) -> np.ndarray:
        if not path.stat().st_size:  # cannot be mapped
            return np.empty(0, dtype)
        with path.open("rb") as file:
            self.maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return np.frombuffer(self.maps[-1], dtype)

    def forget(self) -> None:
        """What was looked at need not stay in this process's memory."""
        for one in self.maps:
            one.madvise(mmap.MADV_DONTNEED)

    def of(self, place: int) -> np.ndarray:
        """The set of the row at a place: shard times 2**32, plus row."""
        sets, info = self.shard(place >> 32)
        row = info[place & 0xFFFFFFFF]
        return sets[int(row["end"]) - int(row["size"]) : int(row["end"])]

    def info(self, places: np.ndarray) -> np.ndarray:
        """The INFO of rows at some places."""
        found = np.empty(len(places), INFO)
        shards = (places >> np.uint64(32)).astype(np.int64)
        for number in np.unique(shards).tolist():
            here = shards == number
            found[here] = self.shard(number)[1][(places[here] & np.uint64(0xFFFFFFFF)).astype(np.int64)]
            self.forget()
        return found


class Shingler:
    """Text to set, remembering the hashes of words."""

    def __init__(self):
        self.hashes = Hashes()

    def __call__(self, text: str) -> np.ndarray:
        return shingles(self.hashes.of(words(text)), WORDS)
