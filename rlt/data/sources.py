"""Where rows come from: a question generator, JSONL, JSON, CSV or Parquet files, a dataset hub.

A row has `question`, `solution` and `reasoning_trace` (None where there is none), all text. Rows of two-message
`conversations` (as in Bespoke-Stratos-17k) are taken apart by their thought and solution tags. Columns of the source's
own stay beside them as JSON has them, for a user's reward functions. Importing this module is quick, and so is
`inspect_source`: plan.py asks it before anything heavy is loaded.
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from rlt.data.benchmarks import PREFIX as BENCHMARK
from rlt.data.benchmarks import benchmark_rows, check_benchmark
from rlt.data.files import SUFFIXES, columns_of, read_file, readable
from rlt.data.generator import GENERATED_ROWS, GENERATOR, generated_rows, task_and_options
from rlt.data.room import Room
from rlt.errors import Refused
from rlt.places import LOCAL_STARTS, MARKER, PREPARED, looked_in

REQUIRED = ("question", "solution")
OPTIONAL = ("system", "teacher_system_prompt", "student_system_prompt", "id", "task", "metadata")
KNOWN = (*REQUIRED, "reasoning_trace", *OPTIONAL)
# What a source's own columns may not be called: TRL gives these to a reward function itself, keeps them from it, or
# takes them for pictures.
TAKEN = frozenset(
    {
        *("prompt", "prompts", "completion", "completions", "completion_ids"),
        *("trainer_state", "log_extra", "log_metric", "environments", "image", "images"),
    }
)
RENAMED = "data_"  # what the name of such a column begins with here
TAGS = (("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|begin_of_solution|>", "<|end_of_solution|>"))

Tags = tuple[tuple[str, str], tuple[str, str]]

logger = logging.getLogger("rlt")


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
            found = generated_rows(source.removeprefix(GENERATOR), seed, size or GENERATED_ROWS)
        elif source.startswith(BENCHMARK):
            found = benchmark_rows(source.removeprefix(BENCHMARK))
        else:
            found = _read(source, split)
        return _usable(found, source, size, tags)


def _usable(found: Iterable[dict], source: str, size: int | None, tags: Tags) -> Rows:
    rows, dropped, room = [], Counter(), Room(source)
    for number, row in enumerate(found, start=1):
        try:
            usable, reason = _clean(row, tags, f"{source} row {number}")
        except RecursionError:
            raise Refused(f"{source} row {number} is nested too deeply to be read") from None
        if usable is None:
            dropped[reason] += 1
        else:
            room.take(usable)
            rows.append(usable)
        if size is not None and len(rows) == size:
            break
    return Rows(rows, dict(dropped))


def _clean(row: dict, tags: Tags, place: str) -> tuple[dict | None, str]:
    """The row as text, or None and why it is left out."""
    if "conversations" in row and "question" not in row:
        taken, reason = _from_conversation(row, tags)
        if taken is None:
            return None, reason
        row = taken
    _check_columns(row, place)
    for column in (*REQUIRED, "reasoning_trace"):
        if isinstance(row.get(column), (dict, list)):
            raise Refused(f"{place}: {column} must be text, it is a {type(row[column]).__name__}")
    clean: dict[str, Any] = {column: _text(row[column]) for column in REQUIRED}
    trace = _text(row.get("reasoning_trace"))
    clean["reasoning_trace"] = trace if trace.strip() else None
    clean |= {column: _as_text(row[column]) for column in OPTIONAL if _is_there(row.get(column))}
    clean |= _own_columns(row, place)
    for column in REQUIRED:
        if not clean[column].strip():
            return None, f"empty {column}"
    return clean, ""


def _own_columns(row: dict, place: str) -> dict:
    """What a row has beside the known columns, under names that TRL leaves free; None where a cell is missing.

    Raises:
        Refused: a column stands where one of a taken name would go.
    """
    own = {}
    for column, value in row.items():
        if column is None or column in KNOWN:  # None: a CSV row that is too long
            continue
        name = f"{RENAMED}{column}" if column in TAKEN else column
        if name != column and name in row:
            raise Refused(
                f"{place} has columns {column!r} and {name!r}, of which the first becomes the second: rename one"
            )
        own[name] = _as_json(value)
    return own


def _as_json(value: object) -> object:
    """Text, numbers, truth values, lists and objects as they are; what JSON does not have, as text."""
    if not _is_there(value):
        return None
    if isinstance(value, str | bytes):
        return _text(value)
    return json.loads(json.dumps(value, default=_text))


def _is_there(value: object) -> bool:
    """Whether a value is given: tables put None or NaN in the place of a missing one."""
    return value is not None and (isinstance(value, (dict, list)) or value == value)


def _as_text(value: object) -> str:
    return json.dumps(value, default=_text) if isinstance(value, (dict, list)) else _text(value)


def _text(value: object) -> str:
    """The value as text. A text that was cut may end in half a character, which no tokenizer takes: now a `?`.

    Bytes are text that its table does not mark as such. A number is written without an exponent.
    """
    if not _is_there(value):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and math.isfinite(value):
        return format(Decimal(repr(value)), "f")
    return str(value).encode("utf-8", "replace").decode()


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
    contents = [_content(message.get("value", message.get("content"))) for message in messages]
    texts = [content for content in contents if content is not None]
    if len(texts) < len(contents):
        return None, "conversation has parts that are no text"
    roles = [message.get("from", message.get("role")) for message in messages]
    if roles[:1] == ["system"]:  # kept in the row's column, unless that has its own
        row = {"system": texts[0], **{column: value for column, value in row.items() if _is_there(value)}}
        roles, texts = roles[1:], texts[1:]
    if len(roles) != 2 or roles[0] not in ("user", "human") or roles[1] not in ("assistant", "gpt"):
        return None, "conversation is not one question and one answer"
    question, answer = texts
    parts = [re.search(f"{re.escape(start)}(.*?){re.escape(end)}", answer, re.DOTALL) for start, end in tags]
    found = [part.group(1).strip() for part in parts if part is not None]
    if len(found) < len(parts):
        return None, "no thought or solution tags"
    thought, solution = found
    rest = {column: value for column, value in row.items() if column != "conversations"}
    return {**rest, "question": question.strip(), "reasoning_trace": thought, "solution": solution}, ""


def _content(content: object) -> str | None:
    """The text of a message: as it is, or in parts of the kind `text`; None where a part is another."""
    if not isinstance(content, list):
        return _text(content)
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else None


def _messages(conversations: object) -> list[dict] | None:
    """The messages: a list as it is, or the list in a JSON text, which tables of text hold; None for anything else."""
    if isinstance(conversations, str):
        try:
            conversations = json.loads(conversations)
        except json.JSONDecodeError:
            return None
    listed = isinstance(conversations, list) and all(isinstance(message, dict) for message in conversations)
    return conversations if listed else None


def _read(source: str, split: str) -> Iterable[dict]:
    path = Path(source).expanduser()
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        return _read_folder(path, split)
    inspect_source(source)
    from datasets import load_dataset

    try:
        return _rows_of(load_dataset(source, split=split))
    except OSError as error:  # not found, gated, or no network
        reason = str(error).partition("\n")[0]
        raise Refused(f"{source} is no local file and could not be loaded from the hub: {reason}") from error


def _rows_of(dataset: Any) -> Iterable[dict]:
    """A dataset's rows: iterating one gives dictionaries, which its type does not say."""
    return dataset


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


def _files_of(folder: Path, split: str = "train") -> list[Path]:
    """The files of a folder that rows are read from, one per stem; of a preparation's output those of the split.

    Raises:
        Refused: the folder holds no file of a known kind.
    """
    if (folder / PREPARED).is_dir():
        if not (folder / MARKER).is_file():
            raise Refused(f"{folder} is of a preparation that has not ended ({MARKER} is missing): run it to its end")
        if files := [path for path in sorted((folder / PREPARED).glob(f"{split}-*.jsonl")) if path.stat().st_size]:
            return files
        raise Refused(f"{folder} holds no rows of split {split!r} ({PREPARED}/{split}-*.jsonl)")
    found = [path for path in folder.iterdir() if path.suffix in SUFFIXES]
    # Files of one stem hold the same rows: take one.
    files = sorted({path.stem: path for path in sorted(found)}.values())
    if not files:
        raise Refused(f"{folder} holds no file of {', '.join(SUFFIXES)}, and no dataset saved to disk")
    return files


def _read_folder(folder: Path, split: str) -> Iterable[dict]:
    if not _is_saved_dataset(folder):
        return (row for file in _files_of(folder, split) for row in read_file(file))
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"{folder} holds a saved dataset that cannot be loaded ({error})") from error
    if not isinstance(loaded, DatasetDict):
        return _rows_of(loaded)
    if split not in loaded:
        raise Refused(f"{folder} has no split {split!r}; found {', '.join(sorted(map(str, loaded)))}")
    return _rows_of(loaded[split])


def inspect_source(source: str) -> None:
    """A quick look at names and columns, without network or heavy imports, for the plan.

    Reads the generator's task names, a file's header or first row, or nothing of a hub name.

    Raises:
        Refused: missing file or column, a file that cannot be read, or a task that the generator does not have.
    """
    if source.startswith(GENERATOR):
        task_and_options(source.removeprefix(GENERATOR))
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
            _check_columns(columns_of(_files_of(path)[0]), source)
    elif path.is_file():
        _check_columns(columns_of(path), source)
    elif path.suffix in SUFFIXES or source.count("/") != 1 or source.startswith(LOCAL_STARTS):
        raise Refused(f"{source} does not exist{looked_in(source)}")
