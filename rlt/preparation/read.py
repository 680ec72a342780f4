"""The first stage: every row of every source becomes a record, or is dropped with its reason.

Sources are read file by file, each once, into blocks of records; then the blocks are dealt out to shards, whose number
(`engine_tasks`) is how many tasks every later stage has. Formats whose rows depend on one another (trees, trajectories)
have the rows of all their source's files parted by group first, into `PARTS` files; one at a time is held in memory.
"""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

import orjson
import xxhash

from rlt.durable import read_json, write_whole
from rlt.errors import Refused
from rlt.formats import FORMATS, Format, apply, apply_to_group, find_format, tells
from rlt.formats.columns import Options, Row, Unfit
from rlt.formats.corpora import corpus_files
from rlt.formats.inputs import PACKAGED, Input, Source, files_of, inputs_of, parse_sources
from rlt.formats.readers import Bad, rows_of
from rlt.formats.record import Dropped, Record, content_hash, texts_of
from rlt.formats.trees import unfolded
from rlt.preparation.ledger import Counts
from rlt.preparation.shards import read_shard, shard, writing
from rlt.preparation.stage import Pass, Stage, Task

BLOCK = 1000  # rows
PARTS = 256  # of a file whose rows depend on one another
LOOKED_AT = 20  # first rows of a file, by which a source's format is told or checked


class Read(Stage):
    """Reads and formats."""

    name = "read"
    keys = ("sources", "engine_tasks", "keep_calculations", "answers_per_tree", "longest_line")

    def passes(self) -> list[Pass]:
        return [Pass("format", self.format, tasks=len(inputs_of(self.settings.sources))), Pass("rows", self.deal)]

    def files(self) -> list[Path]:
        """Of packaged corpora."""
        packaged = [source.path for source in parse_sources(self.settings.sources) if source.path.startswith(PACKAGED)]
        return [file for path in packaged for file in corpus_files(path.removeprefix(PACKAGED))]

    def check(self) -> None:
        """That every source has rows, of a format that is known: by its first ones."""
        for source in parse_sources(self.settings.sources):
            self.format_of(source)

    def format_of(self, source: Source, own: Input | None = None) -> Format:
        """Of a source, by the first rows of each of its files; for a task, of its own ones and the first that tell one.

        Raises:
            Refused: as `find_format`, or there is no row.
        """
        bad: Counter[str] = Counter()
        rows = self.first_rows(source, own, bad)
        first = next(rows, None)
        if first is not None:
            known = find_format(source.format, chain([first], rows), f"sources: {source.path}")
            if known.group is not None and source.format is None and len(files_of(source)) > 1:
                name = next(name for name, one in FORMATS.items() if one is known)
                raise Refused(
                    f"sources: rows of {source.path} belong together over its files: say {{format: {name}}}, and they "
                    "are read as one"
                )
            return known
        if not self.settings.allow_empty_sources:
            why = f"begins with {bad.total()} rows that cannot be read ({', '.join(sorted(bad))})"
            raise Refused(
                f"sources: {source.path} {why if bad else 'holds no row'}; allow_empty_sources=true goes on without it"
            )
        return find_format(source.format or "text", [], f"sources: {source.path}")  # which takes no row

    def first_rows(self, source: Source, own: Input | None, bad: Counter[str]) -> Iterator[Row]:
        """So many of each file, from the first that can be read on; those that cannot are counted, by reason."""
        parts = [part for part in inputs_of(self.settings.sources) if part.source == source]
        told = False
        for part, file in [(one, file) for one in parts for file in one.files]:
            if told and own not in (None, part):
                continue
            given = (row for _, row in self.rows(Input(source, (file,), part.several), Counter()))
            count = 0
            for row in given:
                if isinstance(row, Bad):
                    bad[row.reason] += 1
                    continue
                yield row
                told = told or bool(tells(source.format, row))
                count += 1
                if count == LOOKED_AT:
                    break

    def rows(self, part: Input, notes: Counter[str]) -> Iterator[tuple[str, Row | Bad]]:
        """What an input holds, each row with its number, behind that of its file where its source has several."""
        named = FORMATS.get(part.source.format or "")
        lines = named.lines if named is not None else None
        for number, path in part.files:
            empty = True
            given = rows_of(part.source, path, self.settings, lines, notes)
            for row_number, row in enumerate(chain.from_iterable(map(unfolded, given))):
                empty = False
                yield f"{number}-{row_number}" if part.several else str(row_number), row
            notes["files without a row"] += empty

    def format(self, task: Task) -> Counts:
        """One input, into blocks of what is kept and what is dropped."""
        inputs = inputs_of(self.settings.sources)
        if len(inputs) != task.of:
            raise Refused("sources: a file was added or is gone while the sources were read")
        part = inputs[task.number]
        counts, notes = Counts(), Counter()
        known = self.format_of(part.source, part)
        given = islice(self.rows(part, notes), part.source.max_rows)
        results = self.formatted(known, given, task)
        blocks, block = task.place.work / "blocks" / f"{task.number:05d}", 0
        shutil.rmtree(blocks, ignore_errors=True)  # a killed life may have left more of them
        while some := list(islice(results, BLOCK)):
            with writing(shard(blocks, block)) as write:
                for number, row, result in some:
                    entry = _entry(part.source, number, row, result)
                    write(entry)
                    counts.take(part.source.name, entry.get("reason"))
            block += 1
            task.progress(counts.read)
        (task.place.work / "notes").mkdir(parents=True, exist_ok=True)
        write_whole(task.place.work / "notes" / f"{task.number:05d}.json", json.dumps(+notes))
        return counts

    def formatted(
        self, known: Format, given: Iterator[tuple[str, Row | Bad]], task: Task
    ) -> Iterator[tuple[str, Any, Record | Dropped]]:
        """Each row with its number and what becomes of it."""
        options = Options(self.settings.keep_calculations, self.settings.answers_per_tree)
        if known.group is None:
            for number, row in given:
                if isinstance(row, Bad):
                    yield number, row.given, Dropped(row.reason)
                else:
                    yield number, row, apply(known, row, options)
            return
        folder = task.place.work / "parts" / f"{task.number:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files:  # not packed: so many packers would take more memory than the rows
            parts = [files.enter_context((folder / str(n)).open("wb")) for n in range(PARTS)]
            for number, row in given:
                if isinstance(row, Bad):
                    yield number, row.given, Dropped(row.reason)
                    continue
                try:
                    group = known.group(row)
                except Unfit as unfit:
                    yield number, row, Dropped(unfit.reason)
                    continue
                part = xxhash.xxh3_64_intdigest(group.encode()) % PARTS
                parts[part].write(orjson.dumps({"group": group, "number": number, "row": row}) + b"\n")
        for n in range(PARTS):
            with (folder / str(n)).open("rb") as file:
                yield from _grouped(known, map(orjson.loads, file), options)

    def deal(self, task: Task) -> Counts:
        """Every so many-th block, into this task's shard."""
        counts = Counts()
        blocks = sorted((task.place.work / "blocks").glob("*/*"))
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
                task.progress(counts.read)
        if task.number == 0:
            for path in sorted((task.place.work / "notes").iterdir()):
                counts.notes.update(read_json(path))
        return counts


def _entry(source: Source, number: str, row: Any, result: Record | Dropped) -> dict[str, Any]:
    """A line of a block: the record, or the row as it was given beside its reason."""
    if isinstance(result, Dropped):
        return {"reason": result.reason, "score": None, "source": source.name, "row": number, "given": row}
    result |= {"source": source.name, "license": source.license}
    if source.kind is not None:
        result["meta"]["kind"] = source.kind
    result["id"] = f"{source.name}:{number}:{content_hash(result)}"
    return result


def _grouped(
    known: Format, rows: Iterator[dict[str, Any]], options: Options
) -> Iterator[tuple[str, Any, Record | Dropped]]:
    """The results of a part, group by group."""
    groups: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["group"]].append(row)
    for group in groups.values():
        results = apply_to_group(known, [member["row"] for member in group], options)
        yield from ((m["number"], m["row"], result) for m, result in zip(group, results, strict=True))
