"""A process whose log is on a full disk goes on."""

import io

import pytest

from rlt.launching.speech import LossyFile


def test_what_a_full_disk_does_not_take_is_dropped():
    with LossyFile("/dev/full", "w") as log:
        assert log.write(b"a line") == 6
    with pytest.raises(OSError, match="No space left"), io.FileIO("/dev/full", "w") as log:
        log.write(b"a line")


def test_other_failures_are_said(tmp_path):
    file = tmp_path / "log"
    file.touch()
    with LossyFile(str(file), "r") as log, pytest.raises(io.UnsupportedOperation):
        log.write(b"a line")
