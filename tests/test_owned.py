"""Temporary folders of processes that were killed are removed by the next one, and those of living ones are not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from conftest import ROOT, config_of
from test_launch import ranks_of, start, wait_until

from rlt.commands.rank import read_plan
from rlt.launching.owned import LAUNCH, OWNER, Owner, is_gone, owned_folder, started_at, sweep, this_process
from rlt.planning.plan import Plan, make_plan

SECRET = "hf_c0ffee"


def holder(place: Path) -> tuple[subprocess.Popen, Path]:
    """A process that has made a folder, and goes on; and the folder."""
    script = (
        "import sys, time\n"
        "from rlt.launching.owned import LAUNCH, owned_folder\n"
        f"folder = owned_folder(LAUNCH, {str(place)!r})\n"
        "print(folder.name, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(tmp_path):
    (killed, left), (living, kept) = holder(tmp_path), holder(tmp_path)
    try:
        killed.kill()  # and not yet waited for: its number is still taken
        wait_until(lambda: psutil.Process(killed.pid).status() == psutil.STATUS_ZOMBIE, 10)
        assert left.is_dir() and kept.is_dir()
        with owned_folder(LAUNCH, tmp_path) as mine:
            assert not left.exists()
            assert kept.is_dir()
            sweep(tmp_path)
            assert Path(mine).is_dir()
    finally:
        for process in (killed, living):
            process.kill()
            process.wait(10)
    sweep(tmp_path)
    assert not kept.exists()


def other_start(owner: Owner) -> Owner:
    return replace(owner, started=owner.started + 1)


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        (lambda owner: owner, False),
        (other_start, True),  # the number is another process's by now
        (lambda owner: replace(owner, pid=2**22 + 1), True),  # above what Linux gives
        (lambda owner: replace(owner, boot="before"), True),
        (lambda owner: replace(owner, boot="before", host="another"), False),  # in a folder that machines share
        (lambda owner: replace(other_start(owner), namespace="pid:[1]"), False),  # another container's
    ],
)
def test_an_owner_is_gone_when_no_process_can_be_it(change: Callable, gone: bool, tmp_path):
    owner = change(this_process())
    assert is_gone(owner) == gone
    folder = tmp_path / f"{LAUNCH}x"
    folder.mkdir()
    (folder / OWNER).write_text(json.dumps(asdict(owner)))
    sweep(tmp_path)
    assert folder.exists() != gone


def test_what_has_no_owner_or_another_name_or_is_a_link_is_left_alone(tmp_path):
    gone = json.dumps(asdict(other_start(this_process())))
    for name, content in (("rlt-launch-none", None), ("rlt-launch-torn", gone[:20]), ("other", gone)):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / OWNER).write_text(content)
    (tmp_path / "rlt-launch-link").symlink_to(tmp_path / "other")
    before = {path.name for path in tmp_path.iterdir()}
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "other" / OWNER).is_file()


def test_a_start_is_counted_from_the_boot():
    ticks = os.sysconf("SC_CLK_TCK")
    began = started_at(os.getpid())
    assert began is not None
    assert began / ticks == pytest.approx(psutil.Process().create_time() - psutil.boot_time(), abs=2)


def test_a_secret_reaches_a_rank_and_no_file(tiny_run, tmp_path, monkeypatch, in_root):
    plan = make_plan(config_of(*tiny_run, f"output_dir={tmp_path / 'run'}", f"hub_token={SECRET}"))
    (tmp_path / "plan-1.json").write_text(plan.to_json())
    assert SECRET not in (tmp_path / "plan-1.json").read_text()
    assert plan.secrets == {"hub_token": SECRET}
    monkeypatch.setenv("RLT_RANK_SECRETS", json.dumps(plan.secrets))
    read = read_plan(tmp_path)
    assert read.config == plan.config
    assert "RLT_RANK_SECRETS" not in os.environ
    assert json.loads(Plan(**json.loads(plan.to_json())).to_json()) == json.loads(plan.to_json())


def test_the_next_launcher_removes_what_one_left_whose_watchdog_was_killed_too(tiny_run, tmp_path):
    run = [*tiny_run, "max_steps=50", f"hub_token={SECRET}", f"output_dir={tmp_path / 'run'}"]
    with TemporaryDirectory(dir="/dev/shm") as place:
        launcher = start("2", *run, stderr=tmp_path / "log", TMPDIR=place)
        wait_until(lambda: ranks_of(launcher.pid) or launcher.poll() is not None)
        children = psutil.Process(launcher.pid).children(recursive=True)
        written = {path: path.read_bytes() for path in Path(place).rglob("*") if path.is_file()}
        assert "plan-1.json" in {path.name for path in written}
        assert not [path for path, content in written.items() if SECRET.encode() in content]
        (watchdog,) = (p for p in children if "rlt.launching.watchdog" in p.cmdline())
        watchdog.kill()
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait(10)
        psutil.wait_procs(children, 10)
        assert list(Path(place).glob("rlt-launch-*"))
        with owned_folder(LAUNCH, place):
            assert len(list(Path(place).glob("rlt-launch-*"))) == 1
