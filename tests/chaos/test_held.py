"""A rank, a launcher and a server that stand still (SIGSTOP): the first and the last are named and replaced."""

import os
import signal
import time

import psutil
import pytest
from figures import record
from test_faults import assert_ends_as, run_of
from test_launch import ranks_of, reached, start, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROW = "4. held by SIGSTOP"


def rank_numbered(launcher: int, number: int) -> int:
    for pid in ranks_of(launcher):
        if psutil.Process(pid).environ().get("RANK") == str(number):
            return pid
    raise AssertionError(f"no rank {number}")


def test_a_rank_is_named_and_the_ranks_are_started_again(tiny_run, tmp_path):
    straight, held = tmp_path / "straight", tmp_path / "held"
    done = start(*run_of(tiny_run, straight))
    done.communicate(timeout=240)
    assert done.returncode == 0
    log = tmp_path / "log"
    launcher = start(*run_of(tiny_run, held), "restarts=1", stderr=log)
    wait_until(lambda: reached(held, 2))  # the first step is saved
    os.kill(rank_numbered(launcher.pid, 1), signal.SIGSTOP)
    begun = time.monotonic()
    wait_until(lambda: "was held (SIGSTOP)" in log.read_text())
    named = time.monotonic() - begun
    wait_until(lambda: "resuming from" in log.read_text())
    record(ROW, rank_named_s=f"{named:.0f}", rank_works_again_s=f"{time.monotonic() - begun:.0f}")
    assert launcher.wait(240) == 0
    assert_ends_as(held, straight)


def test_a_launcher_that_is_held_keeps_nobody_waiting(tiny_run, tmp_path):
    """Its ranks go on, and it says how they ended once it may."""
    launcher = start(*run_of(tiny_run, tmp_path))
    wait_until(lambda: reached(tmp_path, 1))
    os.kill(launcher.pid, signal.SIGSTOP)
    wait_until(lambda: (tmp_path / "COMPLETE").is_file())
    os.kill(launcher.pid, signal.SIGCONT)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 0
    record(ROW, launcher="the ranks go on")


@pytest.mark.parametrize("part", ["api", "engine"])
def test_a_server_is_named_and_replaced(part, tiny_run, tmp_path):
    run = [
        *tiny_run,
        "use_vllm=true",
        "max_steps=60",
        "eval_size=0",
        "save_steps=1000",
        f"output_dir={tmp_path / 'run'}",
    ]
    log = tmp_path / "log"
    launcher = start("--servers=1", "1", *run, stderr=log)
    wait_until(lambda: reached(tmp_path / "run", 2))
    of_server = [p for p in psutil.Process(launcher.pid).children() if "--uds" in p.cmdline()]
    held = of_server[0] if part == "api" else next(p for p in of_server[0].children() if "EngineCore" in p.name())
    held.suspend()
    begun, before = time.monotonic(), (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    wait_until(lambda: "hung for" in log.read_text())
    named = time.monotonic() - begun
    wait_until(lambda: reached(tmp_path / "run", before + 3))
    record(
        ROW,
        **{
            f"server's {part} named s": f"{named:.0f}",
            f"server's {part} works again s": f"{time.monotonic() - begun:.0f}",
        },
    )
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(120) == 75
    assert named < 60
