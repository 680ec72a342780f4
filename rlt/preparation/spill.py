"""What tasks leave for tasks of a later pass: rows of numbers, dealt out to parts, on disk and in bounded memory.

Every writer (a task) has one file of blocks, each sorted by part, and an index of where each part's rows stand in each
block; a reader takes its part out of all writers' files. So many small files as writers times parts are not made.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from rlt.durable import written_whole
from rlt.formats.record import Dropped

BLOCK = 2**21  # bytes that a writer holds before it sorts and writes them
VERDICT = np.dtype([("row", "<u4"), ("reason", "<u1"), ("score", "<f4")])


class Writer:
    """Takes rows of one dtype, and the part that each belongs to."""

    def __init__(self, file, parts: int):
        self.file, self.parts = file, parts
        self.rows: list[np.ndarray] = []
        self.of: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []
        self.held = 0

    def __call__(self, rows: np.ndarray, parts: np.ndarray) -> None:
        self.rows.append(rows)
        self.of.append(parts.astype(np.uint32))
        self.held += rows.nbytes
        if self.held >= BLOCK:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        rows, of = np.concatenate(self.rows), np.concatenate(self.of)
        self.file.write(rows[np.argsort(of, kind="stable")].tobytes())
        self.counts.append(np.bincount(of, minlength=self.parts))
        self.rows, self.of, self.held = [], [], 0


@contextmanager
def spilling(folder: Path, writer: int, parts: int) -> Iterator[Writer]:
    """The rows of one writer; they are there, whole, once the block has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / f"{writer:05d}.rows") as aside, aside.open("wb") as file:
        found = Writer(file, parts)
        yield found
        found.flush()
    with written_whole(folder / f"{writer:05d}.index") as aside, aside.open("wb") as file:
        np.save(file, np.array(found.counts, dtype=np.int64).reshape(-1, parts))


def spilled(folder: Path, part: int, dtype: np.dtype) -> np.ndarray:
    """The rows of a part, of every writer, in the writers' order."""
    found = []
    for index in sorted(folder.glob("*.index")):
        counts = np.load(index)
        before = np.cumsum(counts).reshape(counts.shape) - counts
        with index.with_suffix(".rows").open("rb") as file:
            for block in np.flatnonzero(counts[:, part]):
                file.seek(int(before[block, part]) * dtype.itemsize)
                found.append(np.frombuffer(file.read(int(counts[block, part]) * dtype.itemsize), dtype))
    return np.concatenate(found) if found else np.empty(0, dtype)


class Verdicts(Mapping[int, Dropped]):
    """{row of a shard: why it is dropped}, in 9 bytes each."""

    def __init__(self, found: np.ndarray, reasons: tuple[str, ...]):
        self.found, self.reasons = np.sort(found, order="row"), reasons

    def __getitem__(self, row: int) -> Dropped:
        place = int(np.searchsorted(self.found["row"], row))
        if place == len(self.found) or self.found["row"][place] != row:
            raise KeyError(row)
        score = float(self.found["score"][place])
        return Dropped(self.reasons[self.found["reason"][place]], None if np.isnan(score) else score)

    def __iter__(self) -> Iterator[int]:
        return iter(self.found["row"].tolist())

    def __len__(self) -> int:
        return len(self.found)
