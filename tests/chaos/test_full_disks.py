"""A disk that is full, or read-only, under a run's logs or its output: an end with the reason, or no end at all."""

import os
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from figures import record
from test_faults import assert_ends_as, run_of
from test_launch import reached, start, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems"),
]
ROW = "6. a full or read-only disk"


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


@pytest.fixture
def straight(tiny_run, tmp_path):
    launcher = start(*run_of(tiny_run, tmp_path / "straight"), stderr=tmp_path / "straight.log")
    assert launcher.wait(240) == 0
    return tmp_path / "straight"


def test_a_full_disk_of_logs_stops_nothing(tiny_run, straight, tmp_path):
    folder = tmp_path / "run"
    with disk(folder / "logs", 64 * 1024):
        (folder / "logs" / "filling").write_bytes(bytes(60 * 1024))
        launcher = start(*run_of(tiny_run, folder), stderr=tmp_path / "log")
        assert launcher.wait(240) == 0, (tmp_path / "log").read_text()[-3000:]
    record(ROW, logs="the run goes on")
    assert_ends_as(folder, straight)


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
