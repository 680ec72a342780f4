"""An hour of accidents, one in five minutes: the weights are those of a run without any.

`./run_tests.sh -m slow tests/chaos/test_soak.py`: an hour, then the same steps once more without accidents. SOAK_S and
SOAK_EVERY_S are the seconds of the whole and between two accidents. Goodput is the part of the hour that went into
steps of which the run was made in the end.
"""

import json
import os
import random
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
from figures import record
from test_damage import turn_a_bit
from test_faults import assert_ends_as
from test_launch import ranks_of, start, wait_until

from rlt.runs.manifest import last_checkpoint

SOAK_S = float(os.environ.get("SOAK_S", "3600"))
EVERY_S = float(os.environ.get("SOAK_EVERY_S", "300"))
AROUND, AMISS = 50, 6  # steps; a pair of steps that takes so many times as long as these has an accident in it
pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * SOAK_S + 1200)]


def kill_a_rank(launcher: subprocess.Popen, folder: Path) -> None:
    for pid in random.sample(ranks_of(launcher.pid), min(1, len(ranks_of(launcher.pid)))):
        os.kill(pid, signal.SIGKILL)


def hold_a_rank(launcher: subprocess.Popen, folder: Path) -> None:
    for pid in random.sample(ranks_of(launcher.pid), min(1, len(ranks_of(launcher.pid)))):
        os.kill(pid, signal.SIGSTOP)


def kill_the_launcher(launcher: subprocess.Popen, folder: Path) -> None:
    launcher.kill()


def stop(launcher: subprocess.Popen, folder: Path) -> None:
    launcher.send_signal(signal.SIGTERM)


def damage_a_checkpoint(launcher: subprocess.Popen, folder: Path) -> None:
    launcher.kill()
    launcher.wait(10)
    wait_until(lambda: not ranks_of(launcher.pid))  # none removes a checkpoint that is being damaged
    newest = max(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None and (newest / "training_state.pt").is_file():
        turn_a_bit(newest / "training_state.pt")


SURVIVED = [kill_a_rank, hold_a_rank]  # by the launcher itself
ACCIDENTS = [*SURVIVED, kill_the_launcher, stop, damage_a_checkpoint]


def productive_seconds(folder: Path) -> float:
    """That the steps took of which the run was made in the end: without what was lost, repeated or waited for.

    Between two of these steps an accident may lie: such a pair counts as long as others around it take.
    """
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    times = [record["time"] for record in records if "loss" in record]
    seconds = [after - before for before, after in pairwise(times)]
    usual = [median(seconds[max(0, place - AROUND) : place + AROUND]) for place in range(len(seconds))]
    return sum(one if one < AMISS * most else most for one, most in zip(seconds, usual, strict=True))


def test_the_weights_are_those_of_a_run_without_accidents(tiny_run, tmp_path):
    random.seed(0)
    run = ["2", *tiny_run, "save_steps=2", "eval_size=0", "use_vllm=false", "restarts=100"]
    folder, happened = tmp_path / "run", dict.fromkeys((accident.__name__ for accident in ACCIDENTS), 0)
    endless = [*run, "max_steps=1000000", f"output_dir={folder}"]
    end = time.monotonic() + SOAK_S
    launcher = start(*endless, stderr=tmp_path / "log")
    while (pause := random.uniform(0.5 * EVERY_S, 1.5 * EVERY_S)) < end - time.monotonic():
        time.sleep(pause)
        accident = random.choice(ACCIDENTS)
        accident(launcher, folder)
        happened[accident.__name__] += 1
        if accident not in SURVIVED:
            launcher.wait(120)
            launcher = start(*endless, stderr=tmp_path / "log")
        assert launcher.poll() is None, (tmp_path / "log").read_text()[-3000:]
    time.sleep(max(0.0, end - time.monotonic()))
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(120)
    checkpoint = last_checkpoint(folder)
    assert checkpoint is not None, (tmp_path / "log").read_text()[-3000:]
    goodput = productive_seconds(folder) / SOAK_S
    steps = int(checkpoint.name.rpartition("-")[2]) + 1
    for place in (folder, tmp_path / "straight"):
        last = start(*run, f"max_steps={steps}", f"output_dir={place}", stderr=tmp_path / "last.log")
        assert last.wait(6 * SOAK_S) == 0, (tmp_path / "last.log").read_text()[-3000:]
    record(
        f"12. {SOAK_S / 60:.0f} minutes with an accident in {EVERY_S:.0f} s, on two processes",
        **happened,
        steps=steps,
        goodput=f"{goodput:.0%}",
    )
    assert_ends_as(folder, tmp_path / "straight")
