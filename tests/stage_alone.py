"""One stage of a preparation on given records, without the stages before it, on any number of shards."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlt.preparation.ledger import Counts
from rlt.preparation.shards import read_shard, shard, write_shard
from rlt.preparation.stage import Place, Stage, Task
from rlt.schema import PrepareSettings

BASE = Path(__file__).parents[1] / "cfgs" / "preparation" / "base.yaml"


def settings_for(**given: Any) -> PrepareSettings:
    """The defaults of a preparation, with some keys changed; what all runs have is not set."""
    base = OmegaConf.to_container(OmegaConf.load(BASE))
    assert isinstance(base, dict)
    settings = object.__new__(PrepareSettings)
    for key, value in {**base, "seed": 42, "sources": ["bible.jsonl", "a.jsonl", "b.jsonl"], **given}.items():
        object.__setattr__(settings, key, value)
    return settings


def run_alone(
    stage: type[Stage], folder: Path, records: list[dict], tasks: int = 1, **given: Any
) -> tuple[Counts, list[dict], list[dict]]:
    """What a stage counts, the records that it keeps, and those that it drops; it is checked as a run checks it."""
    before, place = folder / "before", Place(folder, folder / stage.name, folder / "before")
    for number in range(tasks):
        write_shard(shard(before / "shards", number), records[number::tasks])
    made = stage(settings_for(engine_tasks=tasks, **given))
    made.check()
    counts = Counts()
    for one in made.passes():
        counts = Counts()
        for number in range(one.tasks or tasks):
            task = Task(place, number, one.tasks or tasks, lambda count: None)
            counts.add(one.run(task) or Counts())
    counts.check(stage.name)
    assert counts.read == len(records)
    made.check_counts(counts)
    kept = [row for number in range(tasks) for row in read_shard(shard(place.shards, number))]
    dropped = [row for number in range(tasks) for row in read_shard(shard(place.dropped, number))]
    return counts, kept, dropped
