"""SIGTERM at moments from a run's first instant on, once and twice: it saves, exits with 75, and goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from figures import record
from test_launch import ranks_of

from rlt.launching.lifetime import PREEMPTED
from rlt.runs.manifest import damage_of, last_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
UNHEARD = -signal.SIGTERM  # while the interpreter itself is starting: nothing has begun
END_LIMIT_S = 60
STEPS = ["save_steps=1000", "eval_size=0", "max_steps=100000", "use_vllm=false"]


def steps_made(folder: Path) -> int:
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def steps_saved(folder: Path) -> int:
    checkpoint = last_checkpoint(folder)
    assert checkpoint is None or damage_of(checkpoint) is None
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


@pytest.mark.parametrize(("door", "moments", "last_s"), [(["train.py"], 50, 25.0), (["launch.py", "2"], 10, 40.0)])
def test_a_run_that_is_asked_to_stop_at_any_moment(door, moments, last_s, tiny_run, tmp_path):
    """Lives of one run, the n-th of which is asked after n / `moments` of `last_s`; every second one twice."""
    command = [sys.executable, str(ROOT / door[0]), *door[1:], *tiny_run, *STEPS, f"output_dir={tmp_path / 'run'}"]
    codes, lost, took = [], [], []
    for number in range(moments):
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                time.sleep(last_s * number / moments)
                asked = time.monotonic()
                process.send_signal(signal.SIGTERM)
                if number % 2:
                    time.sleep(0.3)
                    process.send_signal(signal.SIGTERM)
                codes.append(process.wait(END_LIMIT_S))
                took.append(time.monotonic() - asked)
                assert not ranks_of(process.pid)
            finally:
                process.kill()
        assert codes[-1] in (PREEMPTED, UNHEARD), (number, codes[-1], (tmp_path / "log").read_text()[-3000:])
        assert codes[-1] == PREEMPTED or not (tmp_path / "log").read_bytes(), number
        lost.append(steps_made(tmp_path / "run") - steps_saved(tmp_path / "run"))
    heard = codes.count(PREEMPTED)
    record(
        "7. SIGTERM, every second time twice",
        **{
            f"{door[0]}, exit 75": f"{heard} of {moments} (the others before the interpreter listened)",
            f"{door[0]}, steps lost at most": max(lost),
            f"{door[0]}, seconds to the exit at most": f"{max(took):.1f}",
        },
    )
    assert max(lost) <= 1
    assert heard >= moments - 1
    assert steps_saved(tmp_path / "run") > 0
