"""An output folder is held by one run, or refused in one line."""

import errno
import fcntl
import logging
import os
import socket
import subprocess

import pytest
from conftest import config_of

from rlt.runs.folder import check_output, folder_lock, prepare_output


@pytest.fixture
def nobody():
    """Root may write everywhere: what is refused to others is tried as a user without rights."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def refused(folder, message: str) -> None:
    with pytest.raises(ValueError, match=f"output_dir={folder} {message}.*choose another"), folder_lock(folder):
        pass


def test_a_missing_folder_is_made_and_held_once(tmp_path):
    with folder_lock(tmp_path / "a" / "b"):
        holder = f"process {os.getpid()} of {socket.gethostname()}"
        refused(tmp_path / "a" / "b", f"is in use by another run \\({holder}\\)")
    with folder_lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()


def test_a_file_is_refused_and_so_is_a_folder_below_one(tmp_path):
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "cannot be made or opened .*File exists")
    refused(tmp_path / "file" / "run", "cannot be made or opened .*Not a directory")


def test_a_folder_of_another_user_is_refused(nobody):
    refused("/usr", "cannot be written to")
    refused("/usr/run_of_mine", "cannot be made or opened .*Permission denied")


def test_the_lock_is_a_files_which_network_file_systems_pass_on(tmp_path):
    with folder_lock(tmp_path):
        held = subprocess.run(["flock", "--nonblock", tmp_path / ".lock", "true"], check=False, timeout=10)
    assert held.returncode == 1
    assert subprocess.run(["flock", "--nonblock", tmp_path / ".lock", "true"], check=False, timeout=10).returncode == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_said(number, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)  # no such file system is here
    with caplog.at_level(logging.WARNING, logger="rlt"), folder_lock(tmp_path):
        pass
    assert f"output_dir={tmp_path} cannot be locked ({os.strerror(number)})" in caplog.text


def test_a_folder_that_was_only_locked_is_new_and_emptying_it_leaves_the_lock(tmp_path):
    config = config_of("run_cfg=teacher_rlt_tiny", f"output_dir={tmp_path}", "overwrite_output_dir=true")
    with folder_lock(tmp_path):
        check_output(config)
        prepare_output(config)
        (tmp_path / "metrics.jsonl").touch()
        prepare_output(config)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml"]
        refused(tmp_path, "is in use by another run")
