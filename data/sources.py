"""Where rows come from: a question generator, JSONL, CSV or Parquet files, a dataset hub.

A row has `question`, `solution` and perhaps `reasoning_trace`, all text. Rows of two-message `conversations` (as in
Bespoke-Stratos-17k) are taken apart by their thought and solution tags.
"""

import csv
import difflib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

GENERATOR = "reasoning_gym/"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
REQUIRED = ("question", "solution")
OPTIONAL = ("reasoning_trace", "system", "teacher_system_prompt", "student_system_prompt", "id", "task")
TAGS = (("<|begin_of_thought|>", "<|end_of_thought|>"), ("<|begin_of_solution|>", "<|end_of_solution|>"))


@dataclass(frozen=True)
class Rows:
    """Usable rows, and how many others were left out, by reason."""

    rows: list[dict]
    dropped: dict[str, int]


def load_rows(
    source: str, *, split: str = "train", seed: int = 0, size: int | None = None, tags: tuple = TAGS
) -> Rows:
    """Read a source.

    Args:
        source: `reasoning_gym/<task>`, a file, a folder of files or of `save_to_disk`, or a hub name.
        split: of a hub dataset.
        seed: of a generator.
        size: most rows to take; a generator needs it (default 1024).
        tags: thought and solution tags of `conversations`.

    Raises:
        ValueError: missing source or column, or a line that is not JSON; says which.
    """
    if source.startswith(GENERATOR):
        found = _generate(source.removeprefix(GENERATOR), seed, size or 1024)
    else:
        found = _read(source, split)
    rows, dropped = [], Counter()
    for row in found:
        usable, reason = _clean(row, tags, source)
        if usable is None:
            dropped[reason] += 1
        else:
            rows.append(usable)
        if size is not None and len(rows) == size:
            break
    return Rows(rows, dict(dropped))


def _clean(row: dict, tags: tuple, source: str) -> tuple[dict | None, str]:
    if "conversations" in row and "question" not in row:
        row = _from_conversation(row, tags)
        if row is None:
            return None, "no thought and solution tags"
    for column in REQUIRED:
        if column not in row:
            raise ValueError(f"{source} has no column {column!r}; it has {sorted(row)}")
    if any(isinstance(row[column], (dict, list)) for column in REQUIRED):
        raise ValueError(f"{source}: question and solution must be text, a row has {type(row['question']).__name__}")
    clean = {c: str(row[c]) for c in (*REQUIRED, *OPTIONAL) if row.get(c) is not None}
    for column in REQUIRED:
        if not clean.get(column, "").strip():
            return None, f"empty {column}"
    return clean, ""


def _from_conversation(row: dict, tags: tuple) -> dict | None:
    texts = [message.get("value", message.get("content", "")) for message in row["conversations"]]
    parts = [re.search(f"{re.escape(a)}(.*?){re.escape(b)}", texts[1], re.DOTALL) if len(texts) == 2 else None for a, b in tags]
    if None in parts:
        return None
    thought, solution = (match.group(1).strip() for match in parts)
    rest = {column: row[column] for column in OPTIONAL if column in row}
    return {**rest, "question": texts[0].strip(), "reasoning_trace": thought, "solution": solution}


def _generate(task: str, seed: int, size: int) -> Iterable[dict]:
    inspect_source(GENERATOR + task)
    import reasoning_gym

    for entry in reasoning_gym.create_dataset(task, seed=seed, size=size):
        trace = entry["metadata"].get("answer_cot")
        yield {"question": entry["question"], "solution": entry["answer"], "reasoning_trace": trace, "task": task}


def _read(source: str, split: str) -> Iterable[dict]:
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path, split)
    inspect_source(source)
    from datasets import load_dataset

    return load_dataset(source, split=split)


def _read_folder(path: Path, split: str) -> Iterable[dict]:
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    if files and not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        return (row for file in files for row in _read_file(file))
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(str(path))
    return loaded[split] if isinstance(loaded, DatasetDict) else loaded


def _read_file(path: Path) -> Iterable[dict]:
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}")


def _json_lines(path: Path) -> Iterable[dict]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is not a JSON object")
            yield row


def inspect_source(source: str) -> None:
    """A quick look without network or heavy imports, for plan.py: the first row only.

    Raises:
        ValueError: missing file or column, or a task that the generator does not have.
    """
    if source.startswith(GENERATOR):
        _check_task(source.removeprefix(GENERATOR))
        return
    path = Path(source).expanduser()
    if path.is_file():
        first = next(iter(_first_rows(path)), None)
        if first is None:
            raise ValueError("the file holds no row")
        if "conversations" in first and "question" not in first:
            return
        for column in REQUIRED:
            if column not in first:
                raise ValueError(f"no column {column!r}; it has {sorted(first)}")
    elif not path.is_dir() and (path.suffix in SUFFIXES or source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise ValueError(f"{source} does not exist")


def _first_rows(path: Path) -> Iterable[dict]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return [dict.fromkeys(pyarrow.parquet.read_schema(path).names)]
    return _read_file(path)


def _check_task(task: str) -> None:
    tasks = generator_tasks()
    if task not in tasks:
        close = difflib.get_close_matches(task, tasks, n=3)
        raise ValueError(f"no task {task!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))


def generator_tasks() -> list[str]:
    """Tasks of reasoning_gym, read from its source, because importing it takes seconds."""
    found = importlib.util.find_spec("reasoning_gym")
    if found is None:
        raise ValueError("the package reasoning-gym is not installed: run ./setup.sh")
    pattern = re.compile(r"register_dataset\(\s*(?:\"(\w+)\"|(\w+)\s*,)")
    constant = re.compile(r"^DATASET_NAME\s*=\s*\"(\w+)\"", re.MULTILINE)
    names = set()
    for path in Path(found.origin).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "register_dataset(" in text:
            names.update(name for name, _ in pattern.findall(text) if name)
            names.update(constant.findall(text))
    return sorted(names)
