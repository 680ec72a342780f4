"""A disk that is full, or read-only, under a run's logs or its output: an end with the reason, or no end at all."""

import errno
import os
import random
import struct
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from figures import record
from test_faults import assert_ends_as, run_of
from test_launch import reached, start, wait_until

SOURCE = Path(__file__).with_name("full_disk.c")
pytestmark = [pytest.mark.slow]
needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems")
ROW = "6. a full or read-only disk"
MOMENTS = 20  # of each error, over all changes of files below the output folder
END_LIMIT_S = 30


@contextmanager
def disk(place: Path, size: int):
    place.mkdir(parents=True, exist_ok=True)
    call("mount", "-t", "tmpfs", "-o", f"size={size}", "rlt-test", place)
    try:
        yield
    finally:
        call("umount", "--lazy", place)


def call(*command) -> None:
    subprocess.run([*map(str, command)], check=True, timeout=60, capture_output=True)


@pytest.fixture(scope="module")
def straight(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    launcher = start(*run_of(tiny_run, folder / "run"), stderr=folder / "log")
    assert launcher.wait(240) == 0
    return folder / "run"


@needs_mounts
@pytest.mark.timeout(900)
def test_a_full_disk_of_logs_stops_nothing(tiny_run, straight, tmp_path):
    folder = tmp_path / "run"
    with disk(folder / "logs", 64 * 1024):
        (folder / "logs" / "filling").write_bytes(bytes(60 * 1024))
        launcher = start(*run_of(tiny_run, folder), stderr=tmp_path / "log")
        assert launcher.wait(240) == 0, (tmp_path / "log").read_text()[-3000:]
    record(ROW, logs="the run goes on")
    assert_ends_as(folder, straight)


@needs_mounts
@pytest.mark.timeout(900)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_output_that_becomes_read_only_ends_the_run_with_the_reason_and_it_goes_on(
    step, tiny_run, straight, tmp_path
):
    """As an error of the disk makes it; the logs are on it, too."""
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(2**30)
    call("mkfs.ext4", "-q", image)
    call("mount", "-o", "loop,errors=remount-ro", image, place)
    try:
        launcher = start(*run_of(tiny_run, place / "run"), stderr=tmp_path / "log")
        wait_until(lambda: reached(place / "run", step))
        device = subprocess.run(["findmnt", "-no", "SOURCE", place], capture_output=True, text=True, check=True).stdout
        Path(f"/sys/fs/ext4/{Path(device.strip()).name}/trigger_fs_error").write_text("1")
        begun = time.monotonic()
        code = launcher.wait(120)
        took, said = time.monotonic() - begun, (tmp_path / "log").read_text()
        assert code not in (0, 75) and "Read-only file system" in said, said[-3000:]
        call("umount", place)
        subprocess.run(["e2fsck", "-fy", image], check=False, timeout=60, capture_output=True)
        call("mount", "-o", "loop", image, place)
        again = start(*run_of(tiny_run, place / "run"), stderr=tmp_path / "log")
        assert again.wait(240) == 0, (tmp_path / "log").read_text()[-3000:]
        record(ROW, **{f"output read-only at step {step}, seconds to the end": f"{took:.0f}"})
        assert_ends_as(place / "run", straight)
    finally:
        call("umount", "--lazy", place)


@dataclass
class Disk:
    """One that takes so many changes of files below a folder, and fails each later one (full_disk.c).

    Args:
        library: full_disk.c, compiled.
        under: the folder.
        aside: where its own files are.
    """

    library: Path
    under: Path
    aside: Path

    def variables(self, taken: int, error: int) -> dict[str, str]:
        state = self.aside / "state"
        state.write_bytes(struct.pack("4q", 0, taken, error, 0))
        self.failed.unlink(missing_ok=True)
        names = {"FULL_STATE": state, "FULL_FAILED": self.failed, "FULL_UNDER": self.under, "LD_PRELOAD": self.library}
        return {name: str(value) for name, value in names.items()}

    @property
    def failed(self) -> Path:
        """Where the paths of changes that failed are written."""
        return self.aside / "failed"

    def changes(self) -> int:
        return self._state()[0]

    def failed_s(self) -> float:
        """When the first change failed, as `time.monotonic` has it; 0 if none did."""
        return self._state()[3] / 1e9

    def _state(self) -> tuple[int, ...]:
        return struct.unpack("4q", (self.aside / "state").read_bytes())


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = tmp_path_factory.mktemp("full_disk") / "full_disk.so"
    call("cc", "-O2", "-fPIC", "-shared", "-o", built, SOURCE, "-ldl")
    return built


def code_of(launcher: subprocess.Popen) -> int:
    """Exit status of a launcher, which is ended at its limit."""
    try:
        return launcher.wait(240)
    finally:
        if launcher.poll() is None:
            launcher.kill()


@pytest.mark.timeout(5400)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_whichever_change_is_the_first_to_fail(error, library, tiny_run, straight, tmp_path):
    """The run ends with the reason; or, where its logs alone were meant, with its model. Then it goes on."""
    folder = tmp_path / "run"
    whole = Disk(library, folder, tmp_path)
    launcher = start(*run_of(tiny_run, folder), stderr=tmp_path / "log", **whole.variables(2**62, error))
    assert code_of(launcher) == 0, (tmp_path / "log").read_text()[-3000:]
    assert_ends_as(folder, straight)
    moments = random.Random(error).sample(range(whole.changes()), MOMENTS)
    longest = max(the_disk_fails_after(taken, error, library, tiny_run, straight, tmp_path) for taken in moments)
    words = f"each change fails after one of {MOMENTS} of {whole.changes()} ({errno.errorcode[error]})"
    record(ROW, **{f"{words}, seconds to the end at most": f"{longest:.0f}"})


def the_disk_fails_after(taken: int, error: int, library: Path, tiny_run, straight: Path, above: Path) -> float:
    """Seconds from the first failure to the run's end."""
    place = above / f"after-{taken}"
    place.mkdir()
    its = Disk(library, place / "run", place)
    launcher = start(*run_of(tiny_run, its.under), stderr=place / "log", **its.variables(taken, error))
    code = code_of(launcher)
    took, said = time.monotonic() - its.failed_s(), (place / "log").read_text()
    failed = its.failed.read_text().split()
    if code == 0:
        assert all(path.startswith(f"{its.under}/logs") for path in failed), (taken, failed)
    else:
        assert code != 75 and os.strerror(error) in said, (taken, failed, said[-3000:])
        assert took < END_LIMIT_S, (taken, took, said[-3000:])
    again = start(*run_of(tiny_run, its.under), stderr=place / "again")
    assert code_of(again) == 0, (taken, failed, (place / "again").read_text()[-3000:])
    assert_ends_as(its.under, straight)
    return 0.0 if code == 0 else took
