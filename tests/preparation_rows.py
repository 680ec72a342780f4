"""One row-wise stage over records of a test, through its own task and files."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preparation import settings_of

from rlt.formats.record import Record, make_record, message
from rlt.preparation.ledger import Counts
from rlt.preparation.shards import read_shard, shard, write_shard
from rlt.preparation.stage import Place, RowStage, Task

RUNS = itertools.count()


@dataclass(frozen=True)
class Outcome:
    """What a stage did with some records."""

    kept: list[Record]
    dropped: list[dict[str, Any]]
    counts: Counts

    @property
    def reasons(self) -> list[str]:
        return [row["reason"] for row in self.dropped]


def text(content: str, **meta: Any) -> Record:
    return _named(make_record("text", text=content, meta=meta))


def chat(*turns: Any, kind: str = "chat", **fields: Any) -> Record:
    """User and assistant by turns, where strings are given; other turns as they are."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [message(next(roles), turn) if isinstance(turn, str) else turn for turn in turns]
    return _named(make_record(kind, messages=messages, **fields))


def _named(record: Record) -> Record:
    return {**record, "id": f"test:{next(RUNS)}", "source": "test"}


def outcome(stage: type[RowStage], folder: Path, records: list[Record], **settings: Any) -> Outcome:
    """Every record of the task, from its shard to what is kept and dropped; the ledger holds."""
    output = folder / f"run{next(RUNS)}"
    place = Place(output, output / "01-stage", output / "00-before")
    write_shard(shard(output / "00-before" / "shards", 0), records)
    made = stage(settings_of(output, [], **settings))
    made.check()
    counts = made.task(Task(place, 0, 1, lambda count: None))
    counts.check(stage.name)
    assert counts.read == len(records)
    return Outcome(list(read_shard(shard(place.shards, 0))), list(read_shard(shard(place.dropped, 0))), counts)
