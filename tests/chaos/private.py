"""A /tmp and a /dev/shm of one's own, so that what a run leaves there is seen beside whatever else a machine does."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT
from test_launch import wait_until

PLACES = ("tmp", "dev/shm")
CACHE = "torchinductor_"
# The real /tmp stays in view at those of its folders that a test needs.
MOUNTS = """set -e
mount -t tmpfs none /mnt && mkdir /mnt/tmp && mount --bind /tmp /mnt/tmp
mount -t tmpfs none /tmp && mount -t tmpfs none /dev/shm
for kept in "$@"; do mkdir -p "$kept" && mount --bind "/mnt$kept" "$kept"; done
touch /tmp/.ready && exec sleep 3600"""


class Places:
    """The two folders, as a process that does nothing else holds them."""

    def __init__(self, holder: int, kept: list[Path]):
        self.root, self.kept = Path(f"/proc/{holder}/root"), {path.parts[2] for path in kept}
        self.enter = ["nsenter", f"--target={holder}", "--mount", f"--wd={ROOT}"]

    def left(self) -> list[str]:
        """What is there by now, but for a user's own cache of torch, which has one name for all runs."""
        found = [path.name for place in PLACES for path in (self.root / place).iterdir()]
        return sorted(name for name in found if name not in {*self.kept, ".ready"} and not name.startswith(CACHE))


@contextmanager
def private_places(*needed: Path) -> Iterator[Places]:
    """Both folders, empty but for those below /tmp that are needed."""
    kept = [path for path in (ROOT, *needed) if path.parts[1] == "tmp"]
    command = ["unshare", "--mount", "--propagation=private", "bash", "-c", MOUNTS, "bash", *map(str, kept)]
    holder = subprocess.Popen(command)
    try:
        places = Places(holder.pid, kept)
        wait_until(lambda: holder.poll() is not None or (places.root / "tmp" / ".ready").exists(), 10)
        yield places
    finally:
        holder.kill()
        holder.wait(10)
