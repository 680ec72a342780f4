"""Files that a power cut leaves whole: the old content or the new one, on the disk before anything relies on it.

A rename is seen at once, but it and the file's bytes reach the disk when the system likes: after a cut a name may stand
for an empty file. So a file is flushed before it gets its name, and its folder after.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any


def flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_all(folder: Path) -> None:
    """A folder and all that is below it."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        flush(path)
    flush(folder)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place to write to, whose content then is the file's; nothing is changed where writing fails."""
    aside = path.with_name(f"{path.name}.tmp")
    try:
        yield aside
        flush(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    flush(path.parent)


def write_whole(path: Path, text: str) -> None:
    """The old content or the new one, never half of it."""
    with written_whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Where PyTorch's writer of archives fails, the system's reason, if there is one.

    Of a full disk it says `unexpected pos 640 vs 576` or `basic_ios::clear: iostream error`.

    Raises:
        OSError: of a write below the folder that is tried after a RuntimeError.
    """
    try:
        yield
    except RuntimeError:
        with TemporaryFile(dir=folder) as tried:
            tried.write(bytes(2**20))
            os.fsync(tried.fileno())
        raise


def rename(old: Path, new: Path) -> None:
    """A file or a folder whose content has been flushed gets its name."""
    os.rename(old, new)
    flush(new.parent)


def read_json(path: Path) -> Any | None:
    """What a JSON file holds; None where it is not there, or was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):  # UnicodeDecodeError, JSONDecodeError are ValueErrors
        return None


def digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def as_json_lines(rows: list[dict]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a file that a run wrote, one per line, up to the first line that is not whole; none where there is
    no file."""
    found: list[dict] = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return found
        if not isinstance(row, dict):
            return found
        found.append(row)
    return found
