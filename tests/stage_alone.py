"""One stage of a preparation on given records, without the stages before it, on any number of shards."""

import shutil
from pathlib import Path
from typing import Any

from preparation import settings_of

from rlt.formats.record import content_hash, make_record, message
from rlt.preparation.ledger import Counts
from rlt.preparation.shards import read_shard, shard, write_shard
from rlt.preparation.stage import Place, Stage, Task

SOURCES = ["a.jsonl", "b.jsonl", "bible.jsonl"]  # whose records these may be, in this order


def text_record(number: int, text: str, source: str = "a", **fields: Any) -> dict:
    return placed(make_record("text", text=text, **fields), number, source)


def chat_record(number: int, *turns: tuple[str, str], source: str = "a", **fields: Any) -> dict:
    return placed(make_record("chat", messages=[message(role, said) for role, said in turns], **fields), number, source)


def placed(record: dict, number: int, source: str) -> dict:
    return {**record, "source": source, "id": f"{source}:{number}:{content_hash(record)}"}


def lay_out(folder: Path, records: list[dict], tasks: int = 1) -> None:
    """As the stage before would have left them."""
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(tasks):
        write_shard(shard(folder / "before" / "shards", number), records[number::tasks])


def run_passes(stage: type[Stage], folder: Path, tasks: int = 1, **given: Any) -> Counts:
    """All passes of a stage, on what was laid out; its counts are checked as a run checks them."""
    place = Place(folder, folder / stage.name, folder / "before")
    made = stage(settings_of(folder / "out", SOURCES, engine_tasks=tasks, **given))
    made.check()
    counts = Counts()
    for one in made.passes():
        counts = Counts()
        for number in range(one.tasks or tasks):
            task = Task(place, number, one.tasks or tasks, lambda count: None)
            counts.add(one.run(task) or Counts())
    counts.check(stage.name)
    made.check_counts(counts)
    return counts


def run_alone(
    stage: type[Stage], folder: Path, records: list[dict], tasks: int = 1, **given: Any
) -> tuple[Counts, list[dict], list[dict]]:
    """What a stage counts, the records that it keeps, and those that it drops."""
    lay_out(folder / "alone", records, tasks)
    counts = run_passes(stage, folder / "alone", tasks, **given)
    assert counts.read == len(records)
    kept, dropped = (
        [row for number in range(tasks) for row in read_shard(shard(folder / "alone" / stage.name / kind, number))]
        for kind in ("shards", "dropped")
    )
    return counts, kept, dropped
