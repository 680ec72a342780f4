"""An output folder is held by one run, or refused in one line."""

import os

import pytest

from rlt.runs.folder import folder_lock


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
        refused(tmp_path / "a" / "b", "is in use by another run")
    with folder_lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()


def test_a_file_is_refused_and_so_is_a_folder_below_one(tmp_path):
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "cannot be made or opened .*File exists")
    refused(tmp_path / "file" / "run", "cannot be made or opened .*Not a directory")


def test_a_folder_of_another_user_is_refused(nobody):
    refused("/usr", "cannot be written to")
    refused("/usr/run_of_mine", "cannot be made or opened .*Permission denied")
