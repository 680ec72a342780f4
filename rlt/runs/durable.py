"""A run's files, whole after a power cut (rlt/durable.py): what they add up to, and their lines."""

import json
from hashlib import file_digest
from pathlib import Path

from rlt.durable import flush as flush
from rlt.durable import flush_all as flush_all
from rlt.durable import read_json as read_json
from rlt.durable import rename as rename
from rlt.durable import write_whole as write_whole
from rlt.durable import written_whole as written_whole


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
