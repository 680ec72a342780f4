"""Rows of one length, by best-fit decreasing over many sequences at once (arXiv 2404.10830 packs pretraining data so).

Each token of a kept row stands in exactly one packed row; `seq_lengths` says where sequences begin, so that training
lets none see another. A sequence that is longer than a packed row is dropped, or cut in pieces: both are counted. With
rows of several lengths, what may be cut is cut into those, and what may not stands in the shortest row that holds it.

<output>/packed/train-00000.parquet      and validation-00000.parquet; the stage's own shards keep the records
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate
from typing import Any, NamedTuple

from rlt.errors import Refused
from rlt.formats.record import Dropped, Record
from rlt.preparation.ledger import Counts
from rlt.preparation.split import TRAIN, sides
from rlt.preparation.stage import Pass, Stage, Task, write_judged
from rlt.runs.folder import PACKED, TOKENS
from rlt.tokens.bins import best_fit_decreasing
from rlt.tokens.files import PACKED_COLUMNS, array_file, notes_of, read_arrays, writing_arrays

WINDOW = 2**15  # sequences that are packed together
WINDOW_TOKENS = 2**25  # or fewer, if they are long: what is held in memory
OVERFLOWS = ("drop", "split", "error")
TOO_LONG = "longer than pack_length"
NO_LABEL = "no token with a label"


class Sequence(NamedTuple):
    """A row of tokens, or a piece of one."""

    ids: Any  # (T,) int32
    mask: Any  # (T,) uint8
    id: str
    source: str


class Pack(Stage):
    """Packed rows, beside the records."""

    name = "pack"
    version = 3
    keys = ("pack_length", "pack_buckets", "pack_overflow")
    outputs = (PACKED,)

    def check(self) -> None:
        wanted = self.settings.pack_overflow
        if wanted not in (None, *OVERFLOWS):
            raise Refused(f"pack_overflow={wanted}: use null or one of {', '.join(OVERFLOWS)}")
        largest = self.settings.pack_length
        for size in self.settings.pack_buckets or ():
            if not isinstance(size, int) or not 1 < size < largest:
                raise Refused(f"pack_buckets: {size} must be a number of tokens below pack_length={largest}")

    def passes(self) -> list[Pass]:
        return [Pass("rows", self.task)]

    def task(self, task: Task) -> Counts:
        packers: dict[str, Packer] = {}
        with ExitStack() as files:
            for split in sides(self.settings):
                tokens = array_file(task.place.output / TOKENS, split, task.number)
                packed = array_file(task.place.output / PACKED, split, task.number)
                notes = {**notes_of(tokens), "pack_length": str(self.settings.pack_length)}
                write = files.enter_context(writing_arrays(packed, PACKED_COLUMNS, notes))
                packers[split] = Packer(self.sizes(), write)
            counts = write_judged(task, self.judged(task, packers))
            for packer in packers.values():
                packer.close()
        for packer in packers.values():
            counts.notes.update(packer.figures)
        check_ledger(counts.notes)
        return counts

    def sizes(self) -> list[int]:
        """Lengths of packed rows, ascending."""
        return sorted({*(self.settings.pack_buckets or ()), self.settings.pack_length})

    def judged(self, task: Task, packers: "dict[str, Packer]") -> Iterator[tuple[Record, Record | Dropped]]:
        """Each record with what became of its tokens, which come in the same order."""
        folder = task.place.output / TOKENS
        tokens = {split: read_arrays(array_file(folder, split, task.number)) for split in packers}
        for record in task.rows():
            split = record["meta"].get("split", TRAIN)
            row = next(tokens[split])
            assert row["id"] == record["id"], (row["id"], record["id"])
            yield record, packers[split].take(row, self.overflow(record)) or record

    def overflow(self, record: Record) -> str:
        return self.settings.pack_overflow or ("split" if record["kind"] == "text" else "drop")


class Packer:
    """Fills packed rows, window by window.

    Args:
        sizes: of packed rows, ascending.
        write: takes packed rows.

    Attributes:
        figures: the ledger of tokens: in = packed + of dropped rows + of pieces without a label, which is to say whose
            tokens behind the first are not trained: nothing stands before the first to predict it from.
    """

    def __init__(self, sizes: list[int], write):
        self.sizes, self.write = sizes, write
        self.held: list[Sequence] = []
        self.held_tokens = 0
        self.figures: Counter[str] = Counter()

    def take(self, row: dict[str, Any], overflow: str) -> Dropped | None:
        """A row of tokens; why it is dropped, if it is.

        Raises:
            Refused: it is longer than a packed row, and that is an error.
        """
        most, length = self.sizes[-1], row["length"]
        self.figures["tokens_in"] += length
        if length > most and overflow == "error":
            raise Refused(
                f"row {row['id']} has {length} tokens, and pack_length={most}: pack_overflow=drop leaves it out, "
                "split cuts them"
            )
        if length > most and overflow == "drop":
            self.figures["tokens_of_dropped_rows"] += length
            return Dropped(TOO_LONG)
        cuts = pieces(length, self.sizes) if overflow == "split" else [length]
        self.figures["rows_cut"] += len(cuts) > 1
        ends = list(accumulate(cuts))
        parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        learned = [part for part in parts if row["loss_mask"][part][1:].any()]
        if not learned:
            self.figures["tokens_of_dropped_rows"] += length
            return Dropped(NO_LABEL)
        for part in learned:
            self._hold(Sequence(row["input_ids"][part], row["loss_mask"][part], row["id"], row["source"]))
        self.figures["tokens_without_a_label"] += length - sum(part.stop - part.start for part in learned)
        return None

    def _hold(self, sequence: Sequence) -> None:
        self.held.append(sequence)
        self.held_tokens += len(sequence.ids)
        if len(self.held) == WINDOW or self.held_tokens >= WINDOW_TOKENS:
            self.close()

    def close(self) -> None:
        """Pack what is held."""
        import numpy

        for one in best_fit_decreasing([len(sequence.ids) for sequence in self.held], self.sizes):
            members = [self.held[number] for number in one.members]
            row = {
                "input_ids": numpy.concatenate([m.ids for m in members]),
                "loss_mask": numpy.concatenate([m.mask for m in members]),
                "seq_lengths": [len(m.ids) for m in members],
                "ids": [m.id for m in members],
                "sources": [m.source for m in members],
                "bucket": one.length,
            }
            self.write(row)
            self.figures.update(
                tokens_packed=len(row["input_ids"]), packed_rows=1, room=one.length, sequences=len(members)
            )
        self.held, self.held_tokens = [], 0


def pieces(length: int, sizes: list[int]) -> list[int]:
    """Lengths of the pieces that a sequence is cut in: always the longest packed row that it still fills, then the rest
    (Dataset Decomposition, arXiv 2405.13226)."""
    found = []
    for size in reversed(sizes):
        found += [size] * (length // size)
        length %= size
    return [*found, length] if length else found


def check_ledger(figures: dict[str, int]) -> None:
    """That every token is accounted for."""
    gone = figures.get("tokens_of_dropped_rows", 0) + figures.get("tokens_without_a_label", 0)
    packed = figures.get("tokens_packed", 0)
    assert figures.get("tokens_in", 0) == packed + gone, figures
