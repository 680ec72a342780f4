"""Where tensors are kept: any address that fsspec opens, a folder of its own for each save."""

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from rlt.errors import Refused
from rlt.runs.durable import flush_all
from rlt.serving.errors import Missing


@dataclass(frozen=True)
class Storage:
    root: str  # a folder, `s3://bucket/prefix`, ...

    def new_address(self) -> str:
        """Never given twice, so that what was saved under a name stays whole until its successor is."""
        return f"{self.root.rstrip('/')}/{uuid.uuid4().hex}"

    def remove(self, address: str) -> None:
        system, path = url_to_fs(address)
        if system.exists(path):
            system.rm(path, recursive=True)

    def folders(self) -> set[str]:
        """Addresses that something was written to."""
        system, root = url_to_fs(self.root)
        system.makedirs(root, exist_ok=True)
        names = (path.rstrip("/").rpartition("/")[2] for path in system.ls(root, detail=False))
        return {f"{self.root.rstrip('/')}/{name}" for name in names if name}

    def files(self, address: str) -> list[str]:
        system, path = url_to_fs(address)
        return sorted(each.rpartition("/")[2] for each in system.ls(path, detail=False)) if system.exists(path) else []

    def read(self, address: str, name: str) -> bytes:
        if name not in self.files(address):
            raise Missing(f"the file {name!r} is not known")
        system, path = url_to_fs(address)
        return system.cat_file(f"{path}/{name}")


def put_files(folder: Path, address: str) -> int:
    """Copy a folder's files to an address, which holds nothing yet; how many bytes they have."""
    system, place = url_to_fs(address)
    system.makedirs(place, exist_ok=True)
    for path in sorted(folder.iterdir()):
        system.put_file(str(path), f"{place}/{path.name}")
    if isinstance(system, LocalFileSystem):
        flush_all(Path(place))
    return sum(path.stat().st_size for path in folder.iterdir())


@contextmanager
def local_files(address: str) -> Iterator[Path]:
    """A folder with an address's files: itself, or a copy for the time being."""
    system, place = url_to_fs(address)
    if not system.exists(place):
        raise Refused(f"nothing is kept at {address} any more")
    if isinstance(system, LocalFileSystem):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in system.ls(place, detail=False):
            system.get_file(path, f"{folder}/{path.rpartition('/')[2]}")
        yield Path(folder)
