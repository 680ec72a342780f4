"""No training row may hold an evaluation item: its question, or a long answer of it, wherever it stands in the row.

First all rows are looked at for runs of the items' words (overlap.py), then those that have some are scored. A row that
holds `max_contamination` of an item is dropped, and with it all of its group (`meta.group`), since the others are the
same problem in other words. What holds less than that, or an item with other numbers, is kept and noted in `meta`.
"""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import xxhash

from rlt.durable import written_whole
from rlt.errors import Refused
from rlt.formats.record import Dropped, Record
from rlt.preparation.evaluation_sets import file_of, items_of
from rlt.preparation.ledger import Counts
from rlt.preparation.overlap import Index, has_choices, streams_of
from rlt.preparation.stage import Pass, Stage, Task, write_judged

REASONS = ("holds an evaluation item", "variant of a row that holds an evaluation item")
REPORTED = 0.2  # share of an item, from which a row that is kept is noted
CANDIDATES = 20  # keys that a record holds most of, whose choices are looked for
HELD, PART, TEMPLATE = 0, 1, 2  # what a scored row is
NAMES = {PART: "contamination", TEMPLATE: "template_match"}  # of notes in `meta`
NOTED = {PART: "rows kept that hold a part of an item", TEMPLATE: "rows kept that hold an item in other numbers"}
TOO_SHORT = "items too short to look for"
SCORED = np.dtype([("row", "<u4"), ("verdict", "u1"), ("share", "<f4"), ("key", "<u4"), ("group", "<u8")])


class Decontamination(Stage):
    """Drops rows that hold evaluation items."""

    name = "decontamination"
    keys = ("evaluation_sets", "max_contamination")
    score_keys = (NAMES[PART], "share")

    def files(self) -> list[Path]:
        return [file_of(name) for name in self.settings.evaluation_sets]

    def check(self) -> None:
        if self.settings.max_contamination <= 0:
            raise Refused(f"max_contamination={self.settings.max_contamination} must be above 0")
        for name in self.settings.evaluation_sets:
            if next(items_of(name), None) is None:
                raise Refused(f"evaluation_sets: {name} has no item")

    def start(self) -> tuple[Index, Index]:
        """The items as they are, and with all numbers taken for one."""
        items = list(chain.from_iterable(map(items_of, self.settings.evaluation_sets)))
        return Index(items), Index(items, masked=True)

    def passes(self) -> list[Pass]:
        return [Pass("look", self.look), Pass("score", self.score), Pass("rows", self.rows)]

    def look(self, task: Task) -> None:
        """Which rows have runs of items at all, and how many have each."""
        plain, masked = self.start()
        rows_with, any_of, row = np.zeros(len(plain.runs), np.int64), [], -1
        for row, record in enumerate(task.rows()):
            streams = streams_of(record)
            found = plain.found(streams)
            rows_with[found] += 1
            if len(found) or len(masked.found(streams)):
                any_of.append(row)
        folder = task.place.work / "look"
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / f"{task.number:05d}.npz") as aside, aside.open("wb") as file:
            np.savez(file, rows_with=rows_with, rows=row + 1, any_of=np.array(any_of, np.int64))

    def score(self, task: Task) -> None:
        """Rows that have runs of items: how much of which."""
        plain, masked = self.start()
        looked = [np.load(path) for path in sorted((task.place.work / "look").glob("*.npz"))]
        rows_with = np.sum([one["rows_with"] for one in looked], axis=0)
        plain.ignore_common(rows_with, int(sum(one["rows"] for one in looked)))
        own, found = set(looked[task.number]["any_of"].tolist()), []
        for row, record in enumerate(task.rows()):
            if row in own and (scored := self.scored(row, record, plain, masked)):
                found.append(scored)
        with written_whole(_scored(task, task.number)) as aside, aside.open("wb") as file:
            np.save(file, np.array(found, SCORED))

    def scored(self, row: int, record: Record, plain: Index, masked: Index) -> tuple | None:
        """A SCORED row, if there is something to drop or to note."""
        streams, most = streams_of(record), self.settings.max_contamination
        key, share = best(plain, streams)
        if share >= most:
            return row, HELD, share, key, group_key(record)
        like, of_template = best(masked, streams)
        if of_template >= most:
            return row, TEMPLATE, of_template, like, 0
        return (row, PART, share, key, 0) if share >= REPORTED else None

    def rows(self, task: Task) -> Counts:
        """Every row, by its own score and that of its group."""
        plain, masked = self.start()
        all_of = [np.load(_scored(task, number)) for number in range(task.of)]
        groups = {int(key) for one in all_of for key in one["group"][one["verdict"] == HELD]} - {0}
        own = {int(one["row"]): one for one in all_of[task.number]}
        notes = Counter({TOO_SHORT: plain.short if task.number == 0 else 0})

        def judge(row: int, record: Record) -> Record | Dropped:
            one = own.get(row)
            if one is not None and one["verdict"] == HELD:
                return Dropped(REASONS[0], float(one["share"]))
            if group_key(record) in groups:
                return Dropped(REASONS[1])
            if one is None:
                return record
            index = masked if one["verdict"] == TEMPLATE else plain
            notes[NOTED[int(one["verdict"])]] += 1
            note = {"item": index.items[one["key"]].name, "share": round(float(one["share"]), 3)}
            return {**record, "meta": {**record["meta"], NAMES[int(one["verdict"])]: note}}

        counts = write_judged(task, ((record, judge(row, record)) for row, record in enumerate(task.rows())))
        counts.notes.update(notes)
        return counts


def _scored(task: Task, number: int) -> Path:
    return task.place.work / f"scored-{number:05d}.npy"


def best(index: Index, streams: list[list[bytes]]) -> tuple[int, float]:
    """The key that a record holds most of, and its share; of multiple choice, where the choices are there too."""
    shares = index.shares(index.found(streams))
    for key in np.argsort(-shares, kind="stable")[:CANDIDATES].tolist():
        if shares[key] == 0:
            break
        if has_choices(index.items[key], streams):
            return key, float(shares[key])
    return 0, 0.0


def group_key(record: Record) -> int:
    """0: the record is in no group."""
    group = record["meta"].get("group")
    return xxhash.xxh3_64_intdigest(str(group).encode()) or 1 if group else 0
