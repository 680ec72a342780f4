"""Ranks that torchrun starts: the run of `./launch.sh 2`, and what is refused there."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, RUN_TIMEOUT_S, config_of, launch
from safetensors.torch import load_file
from test_launch import reached, wait_until
from torch.distributed import HashStore, TCPStore

from rlt.commands.torchrun import FOLDER, PLAN, hear
from rlt.errors import Refused
from rlt.launching.meeting import draw
from rlt.planning.plan import make_plan

STEPS = ["max_steps=2", "save_steps=1", "eval_size=0"]
HOLDS_A_STORE = """
import time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(60)
"""


def torchrun(*arguments: str) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [sys.executable, *start, str(ROOT / "train.py"), *arguments]


def run_torchrun(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        torchrun(*arguments),
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_torchrun_trains_as_the_launcher_does(tiny_run, tmp_path):
    done = run_torchrun(*tiny_run, *STEPS, f"output_dir={tmp_path / 'torchrun'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "teacher_rlt_tiny on 2 processes, ddp" in done.stderr
    assert done.stdout.count("2 steps, model in") == 1
    ours = launch("launch.py", "2", *tiny_run, *STEPS, f"output_dir={tmp_path / 'launched'}")
    assert ours.returncode == 0, ours.stderr[-3000:]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("torchrun", "launched"))
    for name in b:  # sums differ in their last bits with the number of threads
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pipeline_tiny",), "pipeline_tiny with torchrun: start its stages one by one"),
        (("teacher_rlt_tiny", "use_vllm_server=true"), "use_vllm_server=true with torchrun: start servers with"),
        (("teacher_rlt_tiny", "restarts=1"), "restarts=1 is for ./launch.sh: torchrun has --max-restarts"),
        (("teacher_rlt_tiny", "zero3", "ddp"), "zero3 and ddp: name one sharding"),
        (
            ("teacher_rlt_tiny", "warmup_run=teacher_sft_tiny", "save_total_limit=1"),  # so that a small disk will do
            "starts from teacher_sft_tiny, which has yet to run",
        ),
    ],
)
def test_what_takes_more_than_ranks_is_refused_in_one_line(arguments, said, tmp_path):
    done = run_torchrun(*arguments, "report_to=null", f"results_dir={tmp_path}")
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        line for line in done.stderr.splitlines() if said in line
    ]
    assert done.stderr.count(said) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["generation:2", "backward:2"])
def test_a_peer_of_a_dead_rank_saves_nothing_and_the_restart_ends_the_run(moment, tiny_run, tmp_path):
    place = {"RLT_KILL_AT": moment, "RLT_KILL_RANK": "1"}
    command = torchrun(*tiny_run, *STEPS, f"output_dir={tmp_path}")
    command[3:3] = ["--max-restarts", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False, env={**os.environ, **place}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stderr


@pytest.mark.slow
def test_sigterm_from_outside_saves(tiny_run, tmp_path):
    run = [*tiny_run, "max_steps=200", "save_steps=1000", "eval_size=0", f"output_dir={tmp_path}"]
    process = subprocess.Popen(torchrun(*run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: reached(Path(tmp_path), 1))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert "the same command continues" in said, said[-3000:]
    assert list(tmp_path.glob("checkpoint-*"))


def test_a_rank_whose_output_folder_is_not_rank_0s_is_refused(tiny_run, tmp_path, monkeypatch, in_root):
    monkeypatch.setattr("rlt.launching.meeting.SEEN_LIMIT_S", 0.5)
    store, other = HashStore(), tmp_path / "other"
    plan = make_plan(config_of(*tiny_run, f"output_dir={tmp_path / 'run'}", "hub_token=hf_c0ffee"), 2, sharding="ddp")
    (tmp_path / "run").mkdir()
    other.mkdir()
    store.set(PLAN, plan.to_json())
    store.set(FOLDER, draw(other))
    with pytest.raises(Refused, match=f"output_dir={tmp_path / 'run'} is not the folder of NODE_RANK=0"):
        hear(store)
    store.set(FOLDER, draw(tmp_path / "run"))
    heard = hear(store)
    assert heard is not None and heard.config == {**plan.config, "hub_token": None}
    store.set(PLAN, "")
    assert hear(store) is None


def test_a_peer_that_waits_for_rank_0_ends_by_its_limit_and_with_rank_0(monkeypatch):
    monkeypatch.setattr("rlt.commands.torchrun.DEFAULT_LIMIT_S", 1)
    with pytest.raises(Refused, match="rank 0 was not ready within 1 s"):
        hear(HashStore())
    monkeypatch.setattr("rlt.commands.torchrun.DEFAULT_LIMIT_S", 60)
    rank_0 = subprocess.Popen([sys.executable, "-c", HOLDS_A_STORE], stdout=subprocess.PIPE, text=True)
    peer = TCPStore("127.0.0.1", int(rank_0.stdout.readline()), is_master=False)
    threading.Timer(0.5, rank_0.kill).start()
    assert hear(peer) is None
    assert rank_0.wait(10) == -signal.SIGKILL
