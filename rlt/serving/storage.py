"""Where tensors are kept: a folder of its own for each save, below any address that fsspec opens."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from rlt.serving.errors import Missing
from rlt.workers.tensor_files import BLOCK, opened

PROBE = "probe"


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

    def size(self, address: str, name: str) -> int:
        if name not in self.files(address):
            raise Missing(f"the file {name!r} is not known")
        with opened(address) as (system, path):
            return system.info(f"{path}/{name}")["size"]

    def read(self, address: str, name: str, size: int) -> Iterator[bytes]:
        """A file of a size, in blocks."""
        for start in range(0, size, BLOCK):
            with opened(address) as (system, path):
                yield system.cat_file(f"{path}/{name}", start=start, end=min(size, start + BLOCK))
