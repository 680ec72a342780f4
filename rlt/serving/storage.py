"""Where tensors are kept: any address that fsspec opens, a folder of its own for each save.

`s3://bucket/folder` is read and written by obstore, with what the usual variables say: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, and AWS_ENDPOINT_URL for a server that is not Amazon's.
"""

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from rlt.errors import Refused
from rlt.runs.durable import flush, written_whole
from rlt.serving.errors import Missing

S3 = "s3://"
PULLED = "pulled"  # below a process's folder for temporary files: what it reads of other machines
PART = ".part"
PROBE = "probe"
BLOCK = 8 * 2**20  # bytes of one read


@dataclass(frozen=True)
class Storage:
    root: str  # a folder, `s3://bucket/prefix`, ...

    def new_address(self) -> str:
        """Never given twice, so that what was saved under a name stays whole until its successor is."""
        return f"{self.root.rstrip('/')}/{uuid.uuid4().hex}"

    def check(self) -> None:
        """
        Raises:
            OSError: nothing can be written here.
        """
        address = self.new_address()
        with opened(address) as (system, path):
            system.makedirs(path, exist_ok=True)
            system.pipe_file(f"{path}/{PROBE}", b"x")
        self.remove(address)

    def remove(self, address: str) -> None:
        with opened(address) as (system, path):
            if system.exists(path):
                system.rm(path, recursive=True)

    def folders(self) -> set[str]:
        """Addresses that something was written to."""
        with opened(self.root) as (system, root):
            system.makedirs(root, exist_ok=True)
            system.invalidate_cache()
            found = system.ls(root, detail=False) if system.exists(root) else []
        names = (path.rstrip("/").rpartition("/")[2] for path in found)
        return {f"{self.root.rstrip('/')}/{name}" for name in names if name}

    def files(self, address: str) -> list[str]:
        with opened(address) as (system, path):
            found = system.ls(path, detail=False) if system.exists(path) else []
        return sorted(each.rpartition("/")[2] for each in found)

    def read(self, address: str, name: str) -> bytes:
        if name not in self.files(address):
            raise Missing(f"the file {name!r} is not known")
        with opened(address) as (system, path):
            return system.cat_file(f"{path}/{name}")


@contextmanager
def opened(address: str) -> Iterator[tuple[Any, str]]:
    """A file system and a path in it.

    Raises:
        OSError: what the other side says, in one line.
    """
    if not address.startswith(S3):
        yield url_to_fs(address)
        return
    from obstore.exceptions import BaseError
    from obstore.fsspec import register

    register("s3")
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    try:
        yield url_to_fs(address, **({"client_options": {"allow_http": True}} if plain else {}))
    except (BaseError, FileNotFoundError) as error:
        raise OSError(f"{address}: {str(error).partition(' Debug')[0].splitlines()[0]}") from None


def put_files(folder: Path, address: str) -> int:
    """Copy a folder's files to an address; how many bytes they have.

    A file has its name once it is whole: an object store does so by itself.
    """
    paths = sorted(folder.iterdir())
    with opened(address) as (system, place):
        system.makedirs(place, exist_ok=True)
        for path in paths:
            if not isinstance(system, LocalFileSystem):
                system.put_file(str(path), f"{place}/{path.name}")
                continue
            with written_whole(Path(place) / path.name) as aside:
                system.put_file(str(path), str(aside))
        if isinstance(system, LocalFileSystem):
            flush(Path(place).parent)
    return sum(path.stat().st_size for path in paths)


@contextmanager
def local_files(address: str) -> Iterator[Path]:
    """A folder with an address's files: itself, or a copy for the time being.

    A copy that breaks off is gone on with by the next that asks this process, or one in its place.

    Raises:
        Refused: nothing is there.
    """
    with opened(address) as (system, place):
        if not system.exists(place):
            raise Refused(f"nothing is kept at {address} any more")
        if isinstance(system, LocalFileSystem):
            yield Path(place)
            return
        folder = Path(tempfile.gettempdir()) / PULLED / place.rstrip("/").rpartition("/")[2]
        folder.mkdir(parents=True, exist_ok=True)
        for found in system.ls(place, detail=True):
            _pull(system, found["name"], found["size"], folder / found["name"].rpartition("/")[2])
    try:
        yield folder
    finally:
        for path in folder.iterdir():
            path.unlink()
        with suppress(OSError):  # another one's files
            folder.rmdir()


def _pull(system: Any, name: str, size: int, path: Path) -> None:
    """Only what is not here yet; the file has its name once it is whole."""
    if path.exists():
        return
    aside = path.with_name(f"{path.name}{PART}")
    with aside.open("ab") as file:
        while (start := file.tell()) < size:
            file.write(system.cat_file(name, start=start, end=min(size, start + BLOCK)))
            file.flush()
    aside.rename(path)
