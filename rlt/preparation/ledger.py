"""Rows in = rows kept + rows dropped by reason: counted by every task, summed by stage, checked between stages."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlt.durable import read_json


class LedgerError(AssertionError):
    """Rows that no stage can account for: a defect of a stage, never of the data."""


@dataclass
class Counts:
    """What became of the rows of a task, or of a stage.

    Args:
        read: rows that came in.
        kept: rows that went on.
        dropped: {reason: rows}.
        sources: {source: {"in": rows, "kept": rows}}.
        characters: of the texts that are kept.
        notes: figures of the stage's own, which add up over tasks.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    characters: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def take(self, source: str, reason: str | None, characters: int = 0) -> None:
        """One row of a source: kept where there is no reason."""
        self.read += 1
        of_source = self.sources.setdefault(source, Counter())
        of_source["in"] += 1
        if reason is None:
            self.kept += 1
            of_source["kept"] += 1
            self.characters += characters
        else:
            self.dropped[reason] += 1

    def add(self, other: "Counts") -> None:
        self.read += other.read
        self.kept += other.kept
        self.characters += other.characters
        self.dropped.update(other.dropped)
        self.notes.update(other.notes)
        for source, counts in other.sources.items():
            self.sources.setdefault(source, Counter()).update(counts)

    def as_dict(self) -> dict[str, Any]:
        sources = {name: {"in": c["in"], "kept": c["kept"]} for name, c in sorted(self.sources.items())}
        plain = {"in": self.read, "kept": self.kept, "dropped": dict(sorted(self.dropped.items()))}
        return {**plain, "sources": sources, "characters": self.characters, "notes": dict(sorted(self.notes.items()))}

    @classmethod
    def of_dict(cls, found: dict[str, Any]) -> "Counts":
        sources = {name: Counter(counts) for name, counts in found["sources"].items()}
        dropped, notes = Counter(found["dropped"]), Counter(found["notes"])
        return cls(found["in"], found["kept"], dropped, sources, found["characters"], notes)

    def check(self, place: str) -> None:
        """Raises:
        LedgerError: rows are missing, or there are too many.
        """
        gone = sum(self.dropped.values())
        if self.read != self.kept + gone:
            raise LedgerError(f"{place}: {self.read} rows in, {self.kept} kept and {gone} dropped")
        by_source = sum(counts["in"] for counts in self.sources.values())
        if by_source != self.read:
            raise LedgerError(f"{place}: {self.read} rows in, and {by_source} by source")


def check_alike(passes: list[Counts], place: str) -> None:
    """That all passes of a stage which count rows count the same ones.

    Raises:
        LedgerError: a later pass met other rows than an earlier one.
    """
    counted = [counts for counts in passes if counts.read]
    for earlier, later in zip(counted, counted[1:], strict=False):
        if (earlier.read, earlier.kept, earlier.dropped) != (later.read, later.kept, later.dropped):
            raise LedgerError(
                f"{place}: one pass had {earlier.read} rows in, {earlier.kept} of them kept, and the next one "
                f"{later.read}, {later.kept} of them kept"
            )


def read_counts(path: Path) -> Counts | None:
    """What a task or stage noted; None where it did not end."""
    found = read_json(path)
    return None if found is None else Counts.of_dict(found)


def check_chain(before: Counts | None, now: Counts, place: str) -> None:
    """That a stage was given all that the one before it kept.

    Raises:
        LedgerError: it was not, or it does not account for its own rows.
    """
    now.check(place)
    if before is not None and before.kept != now.read:
        raise LedgerError(f"{place}: the stage before it kept {before.kept} rows, and {now.read} came in")
