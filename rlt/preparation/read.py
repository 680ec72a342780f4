"""The first stage: every row of every source becomes a record, or is dropped with its reason.

Sources are read file by file, each once, into blocks of records; then the blocks are dealt out to shards, whose number
(`engine_tasks`) is how many tasks every later stage has.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rlt.data.files import read_file
from rlt.preparation.formats import FORMATS
from rlt.preparation.inputs import Source, check_inputs, parse_sources
from rlt.preparation.ledger import Counts
from rlt.preparation.record import Dropped, Record, content_hash, make_record, message, texts_of
from rlt.preparation.shards import read_shard, shard, writing
from rlt.preparation.stage import Pass, Stage, Task

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
BLOCK = 1000  # rows


class Read(Stage):
    """Reads and formats."""

    name = "read"
    keys = ("sources", "engine_tasks")

    def passes(self) -> list[Pass]:
        self.inputs = check_inputs(parse_sources(self.settings.sources))
        return [Pass("format", self.format, tasks=len(self.inputs)), Pass("rows", self.deal)]

    def format(self, task: Task) -> Counts:
        """One input, into blocks of what is kept and what is dropped."""
        source, path = self.inputs[task.number]
        counts = Counts()
        rows = self.records(source, path)
        block = 0
        while some := list(islice(rows, BLOCK)):
            with writing(shard(task.place.work / f"{task.number:05d}", block)) as write:
                for row in some:
                    write(row)
                    counts.take(source.name, row.get("reason"))
            block += 1
        return counts

    def records(self, source: Source, path: Path | None) -> Iterator[dict[str, Any]]:
        assert path is not None
        for number, row in enumerate(islice(read_file(path), source.max_rows)):
            result = self.record(row)
            if isinstance(result, Dropped):
                yield {"reason": result.reason, "score": None, "source": source.name, "row": number, "given": row}
            else:
                result |= {"source": source.name, "license": source.license}
                result["id"] = f"{source.name}:{number}:{content_hash(result)}"
                yield result

    def record(self, row: dict[str, Any]) -> Record | Dropped:
        if not FORMATS:
            turns = [message("user", row["question"]), message("assistant", row["solution"])]
            return make_record("chat", messages=turns, answer=row["solution"])
        raise NotImplementedError

    def deal(self, task: Task) -> Counts:
        """Every so many-th block, into this task's shard."""
        counts = Counts()
        blocks = sorted(task.place.work.glob("*/*"))
        with (
            writing(shard(task.place.shards, task.number)) as keep,
            writing(shard(task.place.dropped, task.number)) as drop,
        ):
            for block in blocks[task.number :: task.of]:
                for row in read_shard(block):
                    if "reason" in row:
                        counts.take(row["source"], row["reason"])
                        drop(row)
                    else:
                        counts.take(row["source"], None, sum(map(len, texts_of(row))))
                        keep(row)
        return counts
