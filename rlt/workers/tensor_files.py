"""How tensors are written and read: at any address that fsspec opens.

`s3://bucket/folder` is read and written by obstore, with what the usual variables say: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, and AWS_ENDPOINT_URL for a server that is not Amazon's.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from rlt.durable import flush, rename, written_whole
from rlt.errors import Refused

S3 = "s3://"
PULLED = "pulled"  # below a process's folder for temporary files: what it reads of other machines
PART = ".part"
BLOCK = 8 * 2**20  # bytes of one read
RETRY = {"max_retries": 8, "retry_timeout": timedelta(seconds=45)}


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
        yield url_to_fs(address, retry_config=RETRY, **({"client_options": {"allow_http": True}} if plain else {}))
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
    flush(aside)
    rename(aside, path)
