"""Where rows come from: a question generator, JSONL, JSON, CSV or Parquet files, a dataset hub.

A row has `question`, `solution` and `reasoning_trace` (None where there is none), all text. Rows of two-message
`conversations` (as in Bespoke-Stratos-17k) are taken apart by their thought and solution tags. Importing this module
is quick, and so is `inspect_source`: plan.py asks it before anything heavy is loaded.
"""

import csv
import difflib
import importlib.util
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from data.benchmarks import PREFIX as BENCHMARK
from data.benchmarks import benchmark_rows, check_benchmark
from data.worked import worked_solution
from errors import Refused

GENERATOR = "reasoning_gym/"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
REQUIRED = ("question", "solution")
OPTIONAL = ("system", "teacher_system_prompt", "student_system_prompt", "id", "task", "metadata")
TAGS = (("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|begin_of_solution|>", "<|end_of_solution|>"))
NEEDS_CONFIG = {"composite"}  # tasks of the generator that cannot be made from a name alone
# Row i of the generator's seed s is its row i + 1 of seed s - 1: a run's seeds are as far apart as no dataset is long.
SEED_STRIDE = 10_000_000
GENERATED_ROWS = 1024  # when no size is given
CSV_FIELD_LIMIT = 2**27  # characters; the default of 131,072 is shorter than a long reasoning trace

Tags = tuple[tuple[str, str], tuple[str, str]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Usable rows, and how many others were left out, by reason."""

    rows: list[dict]
    dropped: dict[str, int]


def say_dropped(dropped: dict[str, int], source: str) -> None:
    for reason, count in dropped.items():
        if count:
            logger.warning("%s: %d rows left out: %s", source, count, reason)


def load_rows(source: str, *, split: str = "train", seed: int = 0, size: int | None = None, tags: Tags = TAGS) -> Rows:
    """Read a source.

    Args:
        source: `reasoning_gym/<task>` (with options of the task: `reasoning_gym/gcd/max_value:20`),
            `benchmark/<name>`, a file, a folder of files or of `save_to_disk`, or a hub name.
        split: of a hub dataset, or of a saved one that has several.
        seed: of the generator.
        size: most usable rows to take; None takes all there are, and 1024 of the generator's.
        tags: (start, end) of the thought and of the solution in `conversations`.

    Returns:
        rows of text in the order of the source, and how many were left out for which reason.

    Raises:
        Refused: missing source, column, task or split, or a file or line that cannot be read; says which.
    """
    if size is not None and size < 1:
        raise Refused(f"size={size} must be positive, or null for all rows")
    with readable(source):
        if source.startswith(GENERATOR):
            found = _generate(source.removeprefix(GENERATOR), seed, size or GENERATED_ROWS)
        elif source.startswith(BENCHMARK):
            found = benchmark_rows(source.removeprefix(BENCHMARK))
        else:
            found = _read(source, split)
        return _usable(found, source, size, tags)


@contextmanager
def readable(source: str) -> Iterator[None]:
    """What the system refuses to read is input like any other that is wrong."""
    try:
        yield
    except OSError as error:
        raise Refused(f"{source} cannot be read ({error})") from error


def _usable(found: Iterable[dict], source: str, size: int | None, tags: Tags) -> Rows:
    rows, dropped = [], Counter()
    for number, row in enumerate(found, start=1):
        usable, reason = _clean(row, tags, f"{source} row {number}")
        if usable is None:
            dropped[reason] += 1
        else:
            rows.append(usable)
        if size is not None and len(rows) == size:
            break
    return Rows(rows, dict(dropped))


def _clean(row: dict, tags: Tags, place: str) -> tuple[dict | None, str]:
    """The row as text, or None and why it is left out."""
    if "conversations" in row and "question" not in row:
        row, reason = _from_conversation(row, tags)
        if row is None:
            return None, reason
    _check_columns(row, place)
    for column in (*REQUIRED, "reasoning_trace"):
        if isinstance(row.get(column), (dict, list)):
            raise Refused(f"{place}: {column} must be text, it is a {type(row[column]).__name__}")
    clean = {column: _text(row[column]) for column in REQUIRED}
    trace = _text(row.get("reasoning_trace"))
    clean["reasoning_trace"] = trace if trace.strip() else None
    clean |= {column: _as_text(row[column]) for column in OPTIONAL if _is_there(row.get(column))}
    for column in REQUIRED:
        if not clean[column].strip():
            return None, f"empty {column}"
    return clean, ""


def _is_there(value: object) -> bool:
    """Neither None nor the NaN that tables put in the place of a missing value."""
    return value is not None and (isinstance(value, (dict, list)) or value == value)


def _as_text(value: object) -> str:
    return json.dumps(value, default=str) if isinstance(value, (dict, list)) else _text(value)


def _text(value: object) -> str:
    """Halves of a character, which a text that was cut may end in, become question marks; no tokenizer takes them."""
    return str(value).encode("utf-8", "replace").decode() if _is_there(value) else ""


def _check_columns(columns: Iterable[str], place: str) -> None:
    found = [column for column in columns if column is not None]  # a CSV row that is too long has a column None
    if "conversations" in found and "question" not in found:
        return
    for column in REQUIRED:
        if column not in found:
            raise Refused(f"{place} has no column {column!r}; found {', '.join(sorted(found)) or 'none'}")


def _from_conversation(row: dict, tags: Tags) -> tuple[dict | None, str]:
    messages = _messages(row["conversations"] or [])
    if messages is None:
        return None, "conversations are neither a list of messages nor the JSON of one"
    roles = [message.get("from", message.get("role")) for message in messages]
    if len(messages) != 2 or roles[0] not in ("user", "human") or roles[1] not in ("assistant", "gpt"):
        return None, "conversation is not one question and one answer"
    question, answer = (_text(message.get("value", message.get("content"))) for message in messages)
    parts = [re.search(f"{re.escape(start)}(.*?){re.escape(end)}", answer, re.DOTALL) for start, end in tags]
    if None in parts:
        return None, "no thought or solution tags"
    thought, solution = (part.group(1).strip() for part in parts)
    rest = {column: row[column] for column in OPTIONAL if column in row}
    return {**rest, "question": question.strip(), "reasoning_trace": thought, "solution": solution}, ""


def _messages(conversations: object) -> list[dict] | None:
    """The list as it is, or of its JSON, as which a table of text holds it; None where it is neither."""
    if isinstance(conversations, str):
        try:
            conversations = json.loads(conversations)
        except json.JSONDecodeError:
            return None
    listed = isinstance(conversations, list) and all(isinstance(message, dict) for message in conversations)
    return conversations if listed else None


def _generate(name: str, seed: int, size: int) -> Iterable[dict]:
    task, options = _task_and_options(name)
    import reasoning_gym

    try:
        entries = reasoning_gym.create_dataset(task, seed=seed * SEED_STRIDE, size=size, **options)
    except (TypeError, AssertionError) as error:
        raise Refused(f"{GENERATOR}{name}: {error}") from None
    for entry in entries:
        trace = worked_solution(task, entry["metadata"])
        known = {**entry["metadata"], "task_options": options} if options else entry["metadata"]  # a check needs them
        metadata = json.dumps(known, default=str)
        row = {"question": entry["question"], "solution": entry["answer"], "reasoning_trace": trace, "task": task}
        yield {**row, "metadata": metadata}


def _task_and_options(name: str) -> tuple[str, dict]:
    """`gcd/max_value:20` gives ("gcd", {"max_value": 20}).

    Raises:
        Refused: no such task, or an option without a value.
    """
    task, *settings = name.split("/")
    _check_task(task)
    options = {}
    for option in settings:
        key, colon, value = option.partition(":")
        if not colon:
            raise Refused(f"{GENERATOR}{name}: {option!r} is no option:value")
        options[key] = yaml.safe_load(value)
    return task, options


def _read(source: str, split: str) -> Iterable[dict]:
    path = Path(source).expanduser()
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        return _read_folder(path, split)
    inspect_source(source)
    from datasets import load_dataset

    try:
        return load_dataset(source, split=split)
    except OSError as error:  # not found, gated, or no network
        reason = str(error).partition("\n")[0]
        raise Refused(f"{source} is no local file and could not be loaded from the hub: {reason}") from error


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


def _files_of(folder: Path) -> list[Path]:
    """Raises:
    Refused: the folder holds no file of a known kind.
    """
    found = [path for path in folder.iterdir() if path.suffix in SUFFIXES]
    files = sorted({path.stem: path for path in sorted(found)}.values())  # of the same rows in several forms, one
    if not files:
        raise Refused(f"{folder} holds no file of {', '.join(SUFFIXES)}, and no dataset saved to disk")
    return files


def _read_folder(folder: Path, split: str) -> Iterable[dict]:
    if not _is_saved_dataset(folder):
        return (row for file in _files_of(folder) for row in read_file(file))
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"{folder} holds a saved dataset that cannot be loaded ({error})") from error
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split not in loaded:
        raise Refused(f"{folder} has no split {split!r}; found {', '.join(sorted(loaded))}")
    return loaded[split]


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
    except (pyarrow.ArrowException, OSError) as error:
        raise Refused(f"{path} is not a Parquet file, or a damaged one ({error})") from None


def _parquet_rows(path: Path) -> Iterable[dict]:
    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


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
        raise Refused(f"{place} is not JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise Refused(f"{place} is not UTF-8 text") from None


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
    with _csv(path) as reader:
        yield from reader


def inspect_source(source: str) -> None:
    """A quick look at names and columns, without network or heavy imports, for plan.py.

    Reads the generator's task names, a file's header or first row, or nothing of a hub name.

    Raises:
        Refused: missing file or column, a file that cannot be read, or a task that the generator does not have.
    """
    if source.startswith(GENERATOR):
        _task_and_options(source.removeprefix(GENERATOR))
        return
    if source.startswith(BENCHMARK):
        check_benchmark(source.removeprefix(BENCHMARK))
        return
    with readable(source):
        _inspect_files(source)


def _inspect_files(source: str) -> None:
    path = Path(source).expanduser()
    if path.is_dir():
        if not _is_saved_dataset(path):
            _check_columns(_columns(_files_of(path)[0]), source)
    elif path.is_file():
        _check_columns(_columns(path), source)
    elif path.suffix in SUFFIXES or source.count("/") != 1 or source.startswith((".", "/", "~", "results/")):
        raise Refused(f"{source} does not exist")


def _columns(path: Path) -> Iterable[str]:
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


def _check_task(task: str) -> None:
    tasks = generator_tasks()
    if task not in tasks:
        close = difflib.get_close_matches(task, tasks, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else f"; it has {', '.join(tasks)}"
        raise Refused(f"reasoning_gym has no task {task!r}{hint}")


@cache
def generator_tasks() -> list[str]:
    """Names of reasoning_gym's tasks, read from its source, because importing it takes seconds.

    Raises:
        Refused: the package is not installed.
    """
    found = importlib.util.find_spec("reasoning_gym")
    if found is None:
        raise Refused("the package reasoning-gym is not installed: run ./setup.sh")
    literal = re.compile(r"register_dataset\(\s*\"(\w+)\"")
    constant = re.compile(r"^DATASET_NAME\s*=\s*\"(\w+)\"", re.MULTILINE)
    names = set()
    for path in Path(found.origin).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "register_dataset(" in text:
            names.update(literal.findall(text), constant.findall(text))
    return sorted(names - NEEDS_CONFIG)
