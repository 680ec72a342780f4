"""The canary for the libraries: what it takes, what it says of parts that break, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.specifiers import SpecifierSet

specification = importlib.util.spec_from_file_location("canary", ROOT / "scripts" / "canary.py")
canary = importlib.util.module_from_spec(specification)
specification.loader.exec_module(canary)


def run_canary(*arguments: object) -> subprocess.CompletedProcess:
    command = [str(ROOT / "scripts" / "canary.sh"), *map(str, arguments)]
    environment = {**os.environ, "RLT_PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_every_range_holds_the_version_that_is_pinned():
    ranges = canary.ranges()
    assert {"trl", "vllm"} <= ranges.keys()
    pins = dict(line.split("==") for line in (ROOT / "requirements.in").read_text().splitlines() if "==" in line)
    for library, wanted in ranges.items():
        assert SpecifierSet(wanted).contains(pins[library]), library
        assert not SpecifierSet(wanted).contains("99.0"), library  # bounded above


def test_every_part_is_a_file_of_tests():
    assert all((ROOT / tests).is_file() for tests, _ in canary.PARTS.values())


def test_what_it_cannot_work_with_is_one_line_and_leaves_everything_as_it_is(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    for arguments, said in (
        ([], "usage: scripts/canary.sh OUT"),
        ([tmp_path / "out", "no-such"], "no-such has no range in requirements.in: use some of trl, vllm"),
        ([tmp_path / "out", "--no-such"], "unrecognized arguments: --no-such"),
        ([tmp_path / "out", "--folder", kept, "trl"], f"{kept} holds files of something else: name another folder"),
        ([kept / "file" / "out"], "Not a directory"),
    ):
        done = run_canary(*arguments)
        assert done.returncode != 0
        assert said in done.stderr
        assert done.stderr.startswith("canary: ") and done.stderr.count("\n") == 1
    assert [path.name for path in kept.iterdir()] == ["file"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A canary's folder whose environment is this one, with three tests."""
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (bin_folder / "python").chmod(0o755)
    (tmp_path / "test_it.py").write_text(
        "import time\n\ndef test_fine(): pass\n\ndef test_broken(): assert False\n\ndef test_slow(): time.sleep(60)\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("tests", "status", "broke", "passed"),
    [
        ("test_it.py::test_fine", "ok", [], 1),
        ("test_it.py::test_broken", "failed", ["test_broken"], 0),
        ("test_it.py::test_slow", "timeout", [], None),
    ],
)
def test_a_part_says_what_broke_and_ends_at_its_limit(tests, status, broke, passed, folder):
    result = canary.run_part(folder, folder / "log.txt", tests, 10)
    assert (result["status"], result.get("passed")) == (status, passed)
    assert result["broke"] == broke
    assert "=== .venv/bin/python -m pytest" in (folder / "log.txt").read_text()


def test_a_part_that_cannot_begin_says_why(folder):
    result = canary.run_part(folder, folder / "log.txt", "no_such_file.py", 10)
    assert result["status"] == "failed"
    assert len(result["broke"]) == 1
    assert not result.get("passed")


def test_the_table_has_a_line_for_each_version():
    fine = {"status": "ok", "seconds": 1.0, "broke": []}
    rows = [
        {"library": "as pinned", "version": "", "parts": {"parity": fine}},
        {"library": "trl", "pinned": "1.16.0", "version": "1.16.0", "parts": {}},
        {"library": "vllm", "pinned": "0.31.0", "version": "0.32.0",
         "parts": {"parity": fine, "engine": {"status": "failed", "seconds": 9.0, "broke": ["test_a", "test_b"]}}},
    ]  # fmt: skip
    assert [line.split() for line in canary.table(json.loads(json.dumps(rows)))][1:] == [
        ["as", "pinned", "nothing", "in", "1", "parts"],
        ["trl", "1.16.0", "1.16.0", "the", "newest", "is", "the", "pinned", "one"],
        ["vllm", "0.31.0", "0.32.0", "engine:", "failed", "test_a,", "test_b"],
    ]


def test_a_version_is_read_from_the_folders_own_environment(folder):
    assert canary.version_of(folder, "trl") == version("trl")
    assert canary.version_of(folder, "no-such-package") == "none"
