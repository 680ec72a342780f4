"""Rows per second of reading: 10,000 rows of all formats, from files to shards, by one process.

    PYTHONPATH=. python benchmarks/preparation_formats.py

Prints, for each format, CPU seconds of parsing and formatting alone, then of the whole first stage, with the rows that
it accounts for.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from preparation import run, settings_of

from rlt.formats import FORMATS, Options, apply, apply_to_group
from rlt.formats.plain import parse_object

ROWS = Path(__file__).parents[1] / "tests" / "data" / "formats"
AT_LEAST = 10_000


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def repeated(row: dict, number: int) -> dict:
    """The row as one of another tree, query or id."""
    names = ("message_id", "parent_id", "message_tree_id", "id")
    return row | {name: f"{row[name]} {number}" for name in names if isinstance(row.get(name), str)}


def lines_of(name: str) -> list[bytes]:
    rows = [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    copies = AT_LEAST // len(FORMATS) // len(rows) + 1
    return [json.dumps(repeated(row, number)).encode() for number in range(copies) for row in rows]


def format_alone(name: str, lines: list[bytes]) -> float:
    """CPU seconds."""
    begin, known = time.process_time(), FORMATS[name]
    rows = [parse_object(line, Counter()) for line in lines]
    if known.group is None:
        for row in rows:
            apply(known, row, Options())
    else:
        groups = defaultdict(list)
        for row in rows:
            groups[known.group(row)].append(row)
        for group in groups.values():
            apply_to_group(known, group, Options())
    return time.process_time() - begin


def main() -> None:
    given = {name: lines_of(name) for name in FORMATS}
    total = sum(map(len, given.values()))
    seconds = {name: format_alone(name, lines) for name, lines in given.items()}
    for name, lines in given.items():
        say(f"{name:<20}{len(lines) / seconds[name]:>12,.0f} rows/s")
    say(f"{'all formats':<20}{total / sum(seconds.values()):>12,.0f} rows/s of {total}")
    with TemporaryDirectory() as folder:
        sources = []
        for name, lines in given.items():
            path = Path(folder) / f"{name}.jsonl"
            path.write_bytes(b"\n".join(lines) + b"\n")
            sources.append({"path": str(path), "format": name})
        settings = settings_of(Path(folder) / "out", sources, stages=["read"])
        begin, wall = time.process_time(), time.monotonic()
        counts = run(settings)["read"].counts
        cpu, wall = time.process_time() - begin, time.monotonic() - wall
    assert counts.read == total == counts.kept + sum(counts.dropped.values())
    say(f"{'the whole stage':<20}{total / cpu:>12,.0f} rows/s of CPU time, {total / wall:,.0f} of wall time")


if __name__ == "__main__":
    main()
