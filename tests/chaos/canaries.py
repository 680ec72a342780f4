"""Canaries: strings that nobody else would write, put where a run keeps secrets, and looked for wherever it writes.

A copy counts as it is, in base64, inside an archive, and inside a table.
"""

import base64
import gzip
import io
import secrets
import threading
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet

LENGTH = 40  # W&B takes no shorter key
LARGEST = 64 * 2**20  # bytes of a file that is looked into
PARQUET, GZIP = b"PAR1", b"\x1f\x8b"


def canaries(places: Iterable[str]) -> dict[str, str]:
    """A string for each place."""
    return {place: secrets.token_hex(LENGTH // 2) for place in places}


def copies(found: bytes, planted: dict[str, str]) -> list[str]:
    """The places whose canary stands in some bytes."""
    return [place for place, canary in planted.items() if any(form in found for form in forms(canary))]


def forms(canary: str) -> list[bytes]:
    """As it is, and what it is in base64, wherever it begins there; the end, which depends on what follows, is left
    out. The canary's half is enough, as a log that is written in blocks may have cut it."""
    found = []
    for half in (canary[: LENGTH // 2], canary[LENGTH // 2 :]):
        found.append(half.encode())
        for before in range(3):
            encoded = base64.b64encode(b"\0" * before + half.encode())
            found.append(encoded[4 * bool(before) : -4])
    return found


def contents(name: str, raw: bytes) -> Iterator[tuple[str, bytes]]:
    """A file's bytes, and what they hold unpacked."""
    yield name, raw
    if raw.startswith(GZIP):
        yield f"{name}, unpacked", gzip.decompress(raw)
    elif raw.startswith(PARQUET):
        yield f"{name}, as text", pyarrow.parquet.read_table(io.BytesIO(raw)).to_pandas().to_csv().encode()
    elif zipfile.is_zipfile(io.BytesIO(raw)):
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for inner in archive.namelist():
                yield f"{name}, {inner}", archive.read(inner)


def copies_below(folders: Iterable[Path], planted: dict[str, str]) -> tuple[list[str], int]:
    """(place and file of each copy, how many files were looked into)."""
    files = [path for folder in folders for path in ([folder] if folder.is_file() else folder.rglob("*"))]
    found, looked_into = [], 0
    for path in files:
        try:
            if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
                continue
            raw = path.read_bytes()
        except OSError:  # it has just gone
            continue
        looked_into += 1
        found += [f"{place}: {path.name!r}" for place in copies(str(path).encode(), planted)]
        found += [f"{place}: {where}" for where, part in contents(str(path), raw) for place in copies(part, planted)]
    return found, looked_into


class CommandLines(threading.Thread):
    """Every command line of what a process has started, but for its own, which a user typed."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process, self.seen, self.done = psutil.Process(pid), set[tuple[str, ...]](), threading.Event()
        self.own = tuple(self.process.cmdline())

    def run(self) -> None:
        while not self.done.wait(0.05):
            try:
                for child in self.process.children(recursive=True):
                    self.seen.add(tuple(child.cmdline()))
            except psutil.Error:  # it has just ended
                continue

    def copies(self, planted: dict[str, str]) -> list[str]:
        """Which canaries were seen, and in whose command line; a fork has its parent's for a moment."""
        lines = [" ".join(words) for words in self.seen - {self.own}]
        return [f"{place}: {line[:200]}" for line in lines for place in copies(line.encode(), planted)]
