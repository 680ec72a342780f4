"""Rows as they stand in JSONL, JSON, CSV and Parquet files."""

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlt.data.room import BATCH_SHARE, GIB, free_bytes
from rlt.errors import Refused

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ROWS_AT_ONCE = 1024  # of a Parquet file
CSV_FIELD_LIMIT = 2**27  # characters; the default of 131,072 is shorter than a long reasoning trace


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Turns an OSError into the `Refused` that all wrong input raises."""
    try:
        yield
    except OSError as error:
        raise Refused(f"{source} cannot be read ({error})") from error


def read_file(path: Path) -> Iterable[dict]:
    """Rows as they stand in a JSONL, JSON, CSV or Parquet file.

    Raises:
        Refused: none of these, or a line or file that cannot be read.
    """
    readers = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise Refused(f"{path} is none of {', '.join(SUFFIXES)}")
    return readers[path.suffix](path)


@contextmanager
def _parquet(path: Path) -> Iterator:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except pyarrow.ArrowMemoryError as error:
        raise Refused(f"{path} cannot be read in the memory that is free ({error}): write smaller row groups") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise Refused(f"{path} is not a Parquet file, or a damaged one ({error})") from None


def _parquet_rows(path: Path) -> Iterable[dict]:
    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=_rows_at_once(path, file.metadata)):
            yield from batch.to_pylist()


def _rows_at_once(path: Path, metadata) -> int:
    """Rows of a batch that fits, though each of them be as long as all that a group's pages hold: a dictionary's one
    text may stand in every row.

    Raises:
        Refused: not even one fits.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    longest = max((group.total_byte_size for group in groups), default=0)  # before its compression
    free = free_bytes()
    if longest > free:
        raise Refused(
            f"{path}: a group of its rows takes {longest / GIB:.1f} GiB, and {free / GIB:.1f} GiB of memory are free: "
            "write it in smaller row groups"
        )
    return int(min(ROWS_AT_ONCE, max(1, free * BATCH_SHARE // max(1, longest))))


def _json_lines(path: Path) -> Iterable[dict]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _json(line, f"{path} line {number}")
            if not isinstance(row, dict):
                raise Refused(f"{path} line {number} is not a JSON object")
            yield row


def _json_list(path: Path) -> list[dict]:
    rows = _json(path.read_bytes(), str(path))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Refused(f"{path} must hold one list of objects; one object a line is a .jsonl file")
    return rows


def _json(text: bytes, place: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        more = ": one object a line is a .jsonl file" if error.msg == "Extra data" and place.endswith(".json") else ""
        raise Refused(f"{place} is not JSON ({error.msg}){more}") from None
    except UnicodeDecodeError:
        raise Refused(f"{place} is not UTF-8 text") from None
    except RecursionError:
        raise Refused(f"{place} is nested too deeply to be read") from None


@contextmanager
def _csv(path: Path) -> Iterator[csv.DictReader]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            yield reader
        except (csv.Error, UnicodeDecodeError) as error:
            raise Refused(f"{path} line {reader.line_num + 1} cannot be read as CSV ({error})") from None


def _csv_rows(path: Path) -> Iterable[dict]:
    """An empty cell is a missing one, as in the other kinds of file."""
    with _csv(path) as reader:
        for row in reader:
            yield {column: value or None for column, value in row.items()}


def columns_of(path: Path) -> Iterable[str]:
    if path.suffix == ".parquet":
        with _parquet(path) as file:
            return file.schema_arrow.names
    if path.suffix == ".csv":
        with _csv(path) as reader:
            return reader.fieldnames or []
    first = next(iter(read_file(path)), None)
    if first is None:
        raise Refused(f"{path} holds no row")
    return first
