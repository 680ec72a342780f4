"""The rows that other runs read: `to=rows` for teachers and students, chat, preference or text for other trainers.

<output>/prepared/train-00000.jsonl      and validation-00000.jsonl, where a share is held out
"""

from contextlib import ExitStack
from typing import Any

import orjson

from rlt.preparation.ledger import Counts
from rlt.preparation.record import Dropped, Record, texts_of
from rlt.preparation.shards import shard, writing
from rlt.preparation.split import TRAIN, VALIDATION
from rlt.preparation.stage import Pass, Stage, Task
from rlt.runs.durable import written_whole
from rlt.runs.folder import PREPARED


def as_rows(record: Record) -> dict[str, Any] | Dropped:
    """A question, its solution, and the thought between them."""
    asked = [turn for turn in record["messages"] if turn["role"] == "user"]
    answered = [turn for turn in record["messages"] if turn["role"] == "assistant"]
    if len(asked) != 1 or len(answered) != 1:
        return Dropped("not one question and one answer")
    row = {"question": asked[0]["content"], "solution": answered[0]["content"], "id": record["id"]}
    return {**row, "reasoning_trace": answered[0]["thinking"], "answer": record["answer"]}


FORMS = {"rows": as_rows}


class Write(Stage):
    """Writes what comes out; rows that do not have the form that is asked for are dropped."""

    name = "write"
    keys = ("to",)
    outputs = (PREPARED,)

    def passes(self) -> list[Pass]:
        return [Pass("rows", self.task)]

    def task(self, task: Task) -> Counts:
        counts, form = Counts(), FORMS[self.settings.to]
        folder = task.place.output / PREPARED
        folder.mkdir(exist_ok=True)
        with ExitStack() as files:
            keep = files.enter_context(writing(shard(task.place.shards, task.number)))
            drop = files.enter_context(writing(shard(task.place.dropped, task.number)))
            out = {}
            for split in (TRAIN, VALIDATION):
                aside = files.enter_context(written_whole(folder / f"{split}-{task.number:05d}.jsonl"))
                out[split] = files.enter_context(aside.open("wb"))
            for record in task.rows():
                row = form(record)
                if isinstance(row, Dropped):
                    counts.take(record["source"], row.reason)
                    drop({"reason": row.reason, "score": None, **record})
                    continue
                counts.take(record["source"], None, sum(map(len, texts_of(record))))
                keep(record)
                out[record["meta"].get("split", TRAIN)].write(orjson.dumps(row) + b"\n")
        return counts
