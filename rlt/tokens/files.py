"""Token ids of a preparation on the disk: parquet files that are written whole, the same bytes for the same rows.

<output>/tokens/train-00000.parquet     one for each record: input_ids, loss_mask, length, id, source, kind
<output>/packed/train-00000.parquet     one for each packed row: input_ids, loss_mask, seq_lengths, ids, sources, bucket
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlt.durable import written_whole

TOKENS_OF_A_GROUP = 2**19  # of rows that are held until they reach the file
ROWS_OF_A_GROUP = 2**14  # or so many, where they are short; each group costs whoever opens the file some memory
ROWS_AT_ONCE = 1024

ARRAYS = {"input_ids": "int32", "loss_mask": "uint8", "seq_lengths": "int32", "ids": "string", "sources": "string"}
SCALARS = {"length": "int32", "id": "string", "source": "string", "kind": "string", "bucket": "int32"}
TOKEN_COLUMNS = ("input_ids", "loss_mask", "length", "id", "source", "kind")
PACKED_COLUMNS = ("input_ids", "loss_mask", "seq_lengths", "ids", "sources", "bucket")


def array_file(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.parquet"


def array_files(folder: Path, split: str) -> list[Path]:
    """All that a preparation has written of a split; none where it has no such stage."""
    return sorted(folder.glob(f"{split}-[0-9]*.parquet"))


class ArrayWriter:
    """Takes rows, one by one, and holds at most a group of them."""

    def __init__(self, file: Any, schema: Any):
        self.file, self.schema = file, schema
        self.rows: list[dict[str, Any]] = []
        self.tokens = 0

    def __call__(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.tokens += len(row["input_ids"])
        if self.tokens >= TOKENS_OF_A_GROUP or len(self.rows) == ROWS_OF_A_GROUP:
            self.flush()

    def flush(self) -> None:
        import pyarrow

        if self.rows:
            columns = [pyarrow.array([row[field.name] for row in self.rows], type=field.type) for field in self.schema]
            self.file.write_table(pyarrow.Table.from_arrays(columns, schema=self.schema))
            self.rows, self.tokens = [], 0
            pyarrow.default_memory_pool().release_unused()  # else it holds twice what a group takes, for the next one


@contextmanager
def writing_arrays(path: Path, columns: tuple[str, ...], notes: dict[str, str] | None = None) -> Iterator[ArrayWriter]:
    """A parquet file that is there, whole, once the block has ended.

    Args:
        notes: of the whole file, which `notes_of` gives back.
    """
    import pyarrow
    from pyarrow import parquet

    kinds = {name: pyarrow.type_for_alias(kind) for name, kind in (ARRAYS | SCALARS).items()}
    fields = [(name, pyarrow.list_(kinds[name]) if name in ARRAYS else kinds[name]) for name in columns]
    schema = pyarrow.schema(fields, metadata=notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as aside, parquet.ParquetWriter(aside, schema, compression="zstd") as file:
        writer = ArrayWriter(file, schema)
        yield writer
        writer.flush()


def read_arrays(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; its arrays of numbers as numpy has them."""
    from pyarrow import parquet

    with parquet.ParquetFile(path, pre_buffer=False) as file:  # which would hold 30 MB of the pages ahead
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            columns = {name: _values(batch.column(name), name) for name in batch.schema.names}
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))


def _values(column: Any, name: str) -> list[Any]:
    if ARRAYS.get(name, "string") == "string":
        return column.to_pylist()
    flat, ends = column.flatten().to_numpy(), column.value_lengths().to_numpy().cumsum()
    return [flat[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def notes_of(path: Path) -> dict[str, str]:
    """What was noted of a whole file."""
    from pyarrow import parquet

    found = parquet.read_schema(path).metadata or {}
    return {key.decode(): value.decode() for key, value in found.items()}
