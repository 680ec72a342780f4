"""Near duplicates: of rows whose runs of five words are mostly the same, the best is kept.

Sets and signatures, by shard; rare runs, by shard; pairs worth a look, by part of the tokens; their exact similarity,
by shard; what is kept, in one task, from verified pairs alone. Two members of one `meta.group` are variants, not
duplicates, unless a key says so.
"""

import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np

from rlt.durable import read_json, write_whole, written_whole
from rlt.errors import Refused
from rlt.preparation.ledger import Counts
from rlt.preparation.near.bands import (
    BY_BAND,
    BY_RARE,
    ENTRY,
    MOST,
    PAIR,
    SLOTS,
    band_tokens,
    merged,
    pairs_of,
    rare_tokens,
    slots,
)
from rlt.preparation.near.cluster import keep_best
from rlt.preparation.near.shingle import Sets, Shingler, compared_text, info_of, preferred, writing_sets
from rlt.preparation.near.signature import SIGNATURES
from rlt.preparation.near.verify import EDGE, verified
from rlt.preparation.order import Order
from rlt.preparation.spill import VERDICT, Verdicts, spilled, spilling
from rlt.preparation.stage import CorpusStage, Pass, Task
from rlt.runs.folder import STAGES

PARTS = 256  # of the tokens: one at a time is held in memory
SLICES = 16  # of a shard's pairs: one at a time is held in memory
ROWS_AT_ONCE = 128
FEW = 20  # rows of a source, below which a share of it alarms nobody
CROWD = 1000  # rows in one component, from which on it is worth a look
KEEP, DROP = "keep", "drop"
REASONS = ("near duplicate",)
FOUND = np.dtype([*VERDICT.descr, ("shard", "<u4")])
SUMMARY = "summary.json"

logger = logging.getLogger("rlt")


class Near(CorpusStage):
    """Drops what is almost an other row."""

    name = "near"
    keys = ("near_similarity", "near_in_group", "near_signature")

    def check(self) -> None:
        settings = self.settings
        if settings.near_signature not in SIGNATURES:
            raise Refused(f"near_signature={settings.near_signature}: use one of {', '.join(SIGNATURES)}")
        if settings.near_in_group not in (KEEP, DROP):
            raise Refused(f"near_in_group={settings.near_in_group}: use {KEEP} or {DROP}")
        if settings.near_similarity <= 0:
            raise Refused(f"near_similarity={settings.near_similarity} must be above 0")

    def check_counts(self, counts: Counts) -> None:
        if (largest := counts.notes["rows of the largest component"]) > CROWD:
            logger.warning("near: %d rows are one component: see what they share, in %s", largest, self.dropped())
        most = self.settings.near_alarm_share
        for source, rows in sorted(counts.sources.items()):
            gone = rows["in"] - rows["kept"]
            if rows["in"] >= FEW and gone > most * rows["in"]:
                raise Refused(
                    f"near: {gone} of {rows['in']} rows of source {source} are near duplicates, more than "
                    f"near_alarm_share={most}: see {self.dropped()}, then raise the key, or fix the source"
                )
        super().check_counts(counts)

    def dropped(self) -> Path:
        """Where a run has the rows that are not kept, as a pattern: the stage's number depends on those before it."""
        return Path(self.settings.output_dir) / STAGES / f"*-{self.name}" / "dropped"

    def decisions(self) -> list[Pass]:
        return [
            Pass("sets", self.sets),
            Pass("frequencies", self.frequencies, tasks=1),
            Pass("rare", self.rare),
            Pass("pairs", self.pairs),
            Pass("verify", self.verify),
            Pass("clusters", self.clusters, tasks=1),
        ]

    def sets(self, task: Task) -> None:
        """Each row's set and its bands; in how many rows of the shard each run is."""
        work, rows, order = task.place.work, task.rows(), Order(self.settings)
        shingler, sign, row = Shingler(), SIGNATURES[self.settings.near_signature], 0
        table = np.zeros(SLOTS, np.uint32)
        with (
            writing_sets(work / "sets", task.number) as write,
            spilling(work / "bands", task.number, PARTS) as spill,
        ):
            while some := list(islice(rows, ROWS_AT_ONCE)):
                texts = [compared_text(record) for record in some]
                found = [shingler(text) for text in texts]
                write(found, [info_of(r, t, order) for r, t in zip(some, texts, strict=True)])
                filled = [n for n, one in enumerate(found) if len(one)]
                if filled:
                    hashes = np.concatenate(found)
                    np.add.at(table, slots(hashes), np.uint32(1))
                    starts = np.cumsum([0, *(len(found[n]) for n in filled)])
                    tokens = band_tokens(sign(hashes, starts))
                    places = places_of(task.number, np.repeat(np.array(filled) + row, tokens.shape[1]))
                    _spill(spill, tokens.ravel(), places)
                row += len(some)
        save_table(work / "tables" / f"{task.number:05d}.npy", table)

    def frequencies(self, task: Task) -> None:
        """Of all shards, in how many rows each run is."""
        total = np.zeros(SLOTS, np.uint32)
        for path in sorted((task.place.work / "tables").glob("*.npy")):
            total += np.load(path)
        save_table(task.place.work / "table.npy", total)

    def rare(self, task: Task) -> None:
        """Each row's rarest runs."""
        table = np.load(task.place.work / "table.npy")
        sets = Sets(task.place.work / "sets")
        hashes, info = sets.shard(task.number)
        with spilling(task.place.work / "rare", task.number, PARTS) as spill:
            for row in range(0, len(info), ROWS_AT_ONCE):
                some = info[row : row + ROWS_AT_ONCE]
                sizes = some["size"].astype(np.int64)
                end = int(some["end"][-1])
                own = np.array(hashes[end - int(sizes.sum()) : end])
                tokens, of = rare_tokens(own, sizes, table, self.settings.near_similarity)
                _spill(spill, tokens, places_of(task.number, of + row))
                sets.forget()

    def pairs(self, task: Task) -> None:
        """Rows that share a token, for the shard of the first of each two to look at."""
        work, in_group = task.place.work, self.settings.near_in_group == DROP
        sets, passed = Sets(work / "sets"), 0
        with spilling(work / "pairs", task.number, self.settings.engine_tasks * SLICES) as spill:
            for part in range(task.number, PARTS, task.of):
                for path, folder in ((BY_BAND, "bands"), (BY_RARE, "rare")):
                    entries = spilled(work / folder, part, ENTRY)
                    found, skipped = pairs_of(entries, sets, self.settings.near_similarity, in_group, path)
                    spill(found, (found["a"] >> np.uint64(32)) * np.uint64(SLICES) + found["a"] % np.uint64(SLICES))
                    passed += skipped if path == BY_RARE else 0
        _note(task, "pairs", {"pairs passed over where more than 64 rows share a run": passed})

    def verify(self, task: Task) -> None:
        """The shard's pairs that are as similar as they must be."""
        work, figures = task.place.work, Counter[str]()
        with spilling(work / "edges", task.number, 1) as spill:
            for part in range(SLICES):
                pairs = merged(spilled(work / "pairs", task.number * SLICES + part, PAIR))
                edges = verified(pairs, Sets(work / "sets"), self.settings.near_similarity)
                spill(edges, np.zeros(len(edges), np.uint32))
                figures["pairs looked at"] += len(pairs)
                figures["pairs alike"] += len(edges)
                figures["pairs alike that bands alone miss"] += int((edges["path"] & BY_BAND == 0).sum())
        _note(task, "verify", figures)

    def clusters(self, task: Task) -> None:
        """What is kept; for each shard, what is not."""
        work = task.place.work
        edges = spilled(work / "edges", 0, EDGE)
        places = np.unique(np.concatenate([edges["a"], edges["b"]]))
        rank = np.empty(len(places), np.int64)
        rank[np.lexsort(preferred(Sets(work / "sets").info(places)))] = np.arange(len(places))
        kept = keep_best(places, edges, rank)
        gone = ~np.isnan(kept.similarity)
        found = np.zeros(int(gone.sum()), FOUND)
        found["row"], found["shard"] = places[gone] & np.uint64(0xFFFFFFFF), places[gone] >> np.uint64(32)
        found["score"] = kept.similarity[gone]
        with spilling(work / "doubles", 0, self.settings.engine_tasks) as spill:
            spill(found, found["shard"])
        notes = Counter[str]()
        for path in sorted((work / "figures").glob("*.json")):
            notes.update(read_json(path) or {})
        notes["components"], notes["rows of the largest component"] = kept.components, kept.largest
        notes["rows kept beside another of their component"] = kept.chained
        write_whole(work / SUMMARY, json.dumps(notes))

    def verdicts(self, task: Task) -> Verdicts:
        return Verdicts(spilled(task.place.work / "doubles", task.number, FOUND), REASONS)

    def task(self, task: Task) -> Counts:
        counts = super().task(task)
        if task.number == 0:  # the stage's own figures stand in one task, as tasks' are summed
            counts.notes.update(read_json(task.place.work / SUMMARY) or {})
        return counts


def places_of(shard: int, rows: np.ndarray) -> np.ndarray:
    """Where rows stand: shard times 2**32, plus row."""
    return (np.uint64(shard) << np.uint64(32)) | rows.astype(np.uint64)


def _spill(spill, tokens: np.ndarray, places: np.ndarray) -> None:
    entries = np.empty(len(tokens), ENTRY)
    entries["token"], entries["place"] = tokens, places
    spill(entries, (tokens >> np.uint64(56)).astype(np.uint32))


def save_table(path, table: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    with written_whole(path) as aside, aside.open("wb") as file:
        np.save(file, np.minimum(table, MOST).astype(np.uint8))


def _note(task: Task, name: str, figures: dict[str, int]) -> None:
    folder = task.place.work / "figures"
    folder.mkdir(exist_ok=True)
    write_whole(folder / f"{name}-{task.number:05d}.json", json.dumps(figures))
