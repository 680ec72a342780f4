"""What a stage is: passes over shards, whose rows it keeps, changes or drops, and what it depends on.

A stage is one class, in `STAGES` (stages.py). Three kinds stand here to build on:

- `Stage`: passes of any kind.
- `RowStage`: looks at each row alone (`one`), or at some at once (`some`).
- `CorpusStage`: decides over all rows first (`decisions`), then drops what `verdicts` names.

Every pass has tasks that know nothing of one another and run in any order, on any engine; what a later pass needs of an
earlier one stands in files below `Task.work`. A task that ends leaves its counts, written last: a task whose counts are
there is not run again.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from rlt.errors import Refused
from rlt.formats.record import Dropped, Record, texts_of
from rlt.preparation.ledger import Counts
from rlt.preparation.shards import read_shard, shard, writing
from rlt.schema import PrepareSettings

ROWS_AT_ONCE = 64
SECONDS_BETWEEN_NOTES = 0.5


@dataclass(frozen=True)
class Place:
    """Where a stage reads and writes, below the run's output folder."""

    output: Path
    folder: Path  # of the stage
    before: Path | None  # of the stage before it; None: it is the first

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def dropped(self) -> Path:
        return self.folder / "dropped"

    @property
    def work(self) -> Path:
        """For what passes leave each other; removed when the stage has ended."""
        return self.folder / "work"

    def given(self, number: int) -> Path:
        """A shard of the stage before."""
        assert self.before is not None
        return shard(self.before / "shards", number)


@dataclass(frozen=True)
class Task:
    """One of a pass's tasks, by its number: `number` of `of`."""

    place: Place
    number: int
    of: int
    progress: "Callable[[int], None]"  # told how many rows (or, of inputs, bytes) have been read so far

    def rows(self) -> Iterator[Record]:
        """The records of this task's shard."""
        for count, record in enumerate(read_shard(self.place.given(self.number))):
            self.progress(count)
            yield record


@dataclass(frozen=True)
class Pass:
    """One walk over the data.

    Args:
        name: among the stage's passes.
        run: does one task; what it counted, in the last pass of a stage.
        tasks: how many; None: one for each shard.
    """

    name: str
    run: Callable[[Task], Counts | None]
    tasks: int | None = None


class Stage:
    """A step of the preparation; its counts come from its last pass."""

    name: ClassVar[str]
    version: ClassVar[int] = 1  # another one once equal settings give other rows: results are made again
    keys: ClassVar[tuple[str, ...]] = ()  # of the settings that its results depend on
    score_keys: ClassVar[tuple[str, ...]] = ()  # into `meta`: where kept rows have what a threshold was compared with
    outputs: ClassVar[tuple[str, ...]] = ()  # folders of the output folder that it alone writes

    def __init__(self, settings: PrepareSettings):
        self.settings = settings

    def depends_on(self) -> tuple[str, ...]:
        """Those of `keys` that its results depend on as they are set."""
        return self.keys

    def folders(self) -> tuple[str, ...]:
        """Those of `outputs` that it writes as it is set."""
        return self.outputs

    def passes(self) -> list[Pass]:
        raise NotImplementedError

    def files(self) -> list[Path]:
        """Files that it reads beside its rows, whose content its results depend on."""
        return []

    def check(self) -> None:
        """Before any hour is spent: that packages, models and files are there. Quick, and imports nothing heavy.

        Raises:
            Refused: something is missing; says what, and the remedy.
        """

    def check_counts(self, counts: Counts) -> None:
        """Of the whole stage, once all of its tasks ended.

        Raises:
            Refused: no run should go on with such a result; says why, and which key allows it.
        """
        if self.settings.allow_empty_sources:
            return
        for source, rows in sorted(counts.sources.items()):
            if rows["in"] and not rows["kept"]:
                reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.dropped.most_common(3))
                raise Refused(
                    f"{self.name} keeps none of the {rows['in']} rows of source {source} (of all sources: {reasons}); "
                    "allow_empty_sources=true goes on without them"
                )


class RowStage(Stage):
    """Looks at rows one by one: `one` gives the record, changed or not, or why it is dropped."""

    def passes(self) -> list[Pass]:
        return [Pass("rows", self.task)]

    def start(self, task: Task) -> None:
        """Once in each task, before its first row: load what rows are looked at with."""

    def one(self, record: Record) -> Record | Dropped:
        raise NotImplementedError

    def some(self, records: list[Record]) -> list[Record | Dropped]:
        """A few rows at once, in order; for stages that are faster so."""
        return [self.one(record) for record in records]

    def notes(self) -> dict[str, int]:
        """Figures of the task, beside rows."""
        return {}

    def task(self, task: Task) -> Counts:
        self.start(task)
        rows = task.rows()
        judged = ((a, b) for some in in_batches(rows) for a, b in zip(some, self.some(some), strict=True))
        counts = write_judged(task, judged)
        counts.notes.update(self.notes())
        return counts


class CorpusStage(Stage):
    """Knows all rows before it drops one: passes that decide, then one that writes."""

    def passes(self) -> list[Pass]:
        return [*self.decisions(), Pass("rows", self.task)]

    def decisions(self) -> list[Pass]:
        raise NotImplementedError

    def verdicts(self, task: Task) -> Mapping[int, Dropped]:
        """Each row that is dropped, by its number within the shard, as decisions left it below `Task.place.work`."""
        raise NotImplementedError

    def kept(self, record: Record, number: int) -> Record:
        """A row that is kept, for stages that note something about it."""
        return record

    def task(self, task: Task) -> Counts:
        verdicts = self.verdicts(task)
        rows = enumerate(task.rows())
        return write_judged(task, ((r, verdicts.get(n) or self.kept(r, n)) for n, r in rows))


def write_judged(task: Task, judged: Iterator[tuple[Record, Record | Dropped]]) -> Counts:
    """Rows and what became of them, to the stage's shard and to that of its dropped rows."""
    counts = Counts()
    with ExitStack() as files:
        keep = files.enter_context(writing(shard(task.place.shards, task.number)))
        drop = files.enter_context(writing(shard(task.place.dropped, task.number)))
        for record, result in judged:
            if isinstance(result, Dropped):
                counts.take(record["source"], result.reason)
                drop({"reason": result.reason, "score": result.score, **record})
            else:
                counts.take(record["source"], None, sum(map(len, texts_of(result))))
                keep(result)
    return counts


def in_batches(rows: Iterator[Record]) -> Iterator[list[Record]]:
    while some := list(islice(rows, ROWS_AT_ONCE)):
        yield some


class ProgressNote:
    """Notes in a file how far a task has come, now and then; what the bar of the run reads."""

    def __init__(self, path: Path):
        self.path, self.noted = path, 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, count: int) -> None:
        if (now := time.monotonic()) - self.noted > SECONDS_BETWEEN_NOTES:
            self.noted = now
            self.path.write_text(str(count), encoding="utf-8")


def key_values(settings: PrepareSettings, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: getattr(settings, key) for key in keys}
