"""The launcher: what it refuses, and that at any end nothing is left and the same command continues."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, launch

from rlt.commands.launch import read_arguments
from rlt.commands.servers import address_of_servers
from rlt.launching.agent import run_ranks
from rlt.launching.environment import read_machines
from rlt.launching.lifetime import PREEMPTED, REFUSED, stop_signals

LIMIT_S = 240
END_LIMIT_S = 60  # from a failure to the end of all that was started


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), *arguments]


def start(*arguments: str, stderr: Path | None = None, **environment: str) -> subprocess.Popen:
    """A launcher; what it says goes into a pipe, or a file."""
    said = stderr.open("w") if stderr else None
    return subprocess.Popen(
        command(*arguments),
        stdout=said or subprocess.PIPE,
        stderr=said or subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def ranks_of(launcher: int) -> list[int]:
    """Processes whose command line names the launcher."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "rlt.commands.rank" in words and str(launcher) in words:
            found.append(int(path.parent.name))
    return found


def wait_until(condition, limit_s: float = LIMIT_S) -> None:
    give_up = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < give_up, "nothing came of it"
        time.sleep(0.2)


def reached(folder: Path, step: int) -> bool:
    file = folder / "metrics.jsonl"
    return file.is_file() and any(json.loads(line)["step"] >= step for line in file.read_text().splitlines())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("teacher_rlt_tiny",), "usage: ./launch.sh DEVICES"),
        (("2", "zero3", "ddp"), "zero3 and ddp: name one sharding"),
        (("4096", "teacher_rlt_tiny"), "4096 processes asked for"),
        (("2", "teacher_rlt_tiny", "train_batch_size=9"), "train_batch_size must be a multiple of 2 devices"),
        (("2", "teacher_rlt_tiny", "zero3", "use_peft=true", "load_in_4bit=true"), "load_in_4bit=true with zero3"),
        (("2", "teacher_rlt_tiny", "overlap_generation=true"), "overlap_generation=true with 2 devices"),
        (("2", "teacher_rlt_tiny", "vllm_tensor_parallel_size=3"), "does not divide the 2 devices"),
        (("--servers=1", "1", "teacher_rlt_tiny", "vllm_tensor_parallel_size=2"), "use one of [1]"),
        (("0", "teacher_rlt_tiny"), "0 devices: only servers"),
        (("2", "no_such_run"), "run_cfg=no_such_run does not exist"),
        (("2", "teacher_rlt_tiny", "restarts=-1"), "restarts=-1 must not be negative"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(arguments, said, tmp_path):
    keys = ["max_steps=1", f"output_dir={tmp_path / 'run'}"]
    done = launch("launch.py", *arguments, *keys, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "host0", "MASTER_PORT": "70000"}, "must be below 65536"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "needs MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "host0"}, "MASTER_ADDR=host0 cannot be reached"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "host0"}, "NODE_RANK=2 with NNODES=2"),
        ({"NNODES": "a"}, "NNODES=a is not a number"),
        ({"NNODES": "3:2"}, "NNODES=3:2: MIN:MAX needs MIN above 0"),
        ({"NNODES": "0:2"}, "NNODES=0:2: MIN:MAX needs MIN above 0"),
        ({"NNODES": "1:"}, "NNODES=1: is not a number"),
        ({"NNODES": "1:2", "NODE_RANK": "0"}, "NNODES=1:2 needs MASTER_ADDR"),
        ({"NNODES": "1:2", "NODE_RANK": "2", "MASTER_ADDR": "host0"}, "NODE_RANK=2 with NNODES=1:2"),
    ],
)
def test_machines_that_do_not_go_together(environment, said):
    with pytest.raises(ValueError, match=said):
        read_machines(environment)


def test_servers_that_others_can_reach_need_a_key():
    assert address_of_servers({}) == {"host": "127.0.0.1", "first_port": 0}
    with pytest.raises(ValueError, match="SERVER_HOST=0.0.0.0 is open to others: set RLT_SERVER_KEY"):
        address_of_servers({"SERVER_HOST": "0.0.0.0"})
    assert address_of_servers({"SERVER_HOST": "10.0.0.1", "SERVER_PORT": "8000", "RLT_SERVER_KEY": "k" * 16}) == {
        "host": "10.0.0.1",
        "first_port": 8000,
    }


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.1"])
def test_a_key_that_can_be_guessed_is_refused(host):
    with pytest.raises(ValueError, match="RLT_SERVER_KEY has 15 characters, which can be guessed: take at least 16"):
        address_of_servers({"SERVER_HOST": host, "RLT_SERVER_KEY": "k" * 15})
    assert address_of_servers({"RLT_SERVER_KEY": ""})["host"] == "127.0.0.1"  # unset: one is drawn


def test_arguments_are_devices_a_run_a_sharding_and_keys():
    assert read_arguments(["8", "teacher_rlt", "offload", "learning_rate=2e-6"]) == (
        8,
        "offload",
        ["teacher_rlt", "learning_rate=2e-6"],
    )
    assert read_arguments(["8"])[1] is None


def test_a_dry_run_counts_all_devices():
    done = launch("launch.py", "8", "teacher_rlt", "dry_run=true", NNODES="2", NODE_RANK="0", MASTER_ADDR="host0")
    assert done.returncode == 0, done.stderr
    assert "per device                4 x 16 devices x 16 accumulated" in done.stdout
    alone = launch("launch.py", "16", "teacher_rlt", "zero3", "dry_run=true")
    assert alone.stdout.partition("devices  ")[2] == done.stdout.partition("devices  ")[2]  # as on GPUs


def test_no_argument_is_answered_with_the_usage():
    for door in ([sys.executable, "launch.py"], ["./launch.sh"], ["./launch_with_server.sh"]):
        done = subprocess.run(door, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "usage: ./launch" in done.stderr


@pytest.mark.parametrize(
    ("nodes", "code", "said"),
    [
        ("3:4", 1, "NNODES=3:4, with 3 machines: per_device_train_batch_size=4 x 3 devices does not divide"),
        ("2:4", 0, "with 3 machines left the run will end: per_device_train_batch_size=4 x 3 devices does not divide"),
    ],
)
def test_a_batch_that_fewer_machines_cannot_divide(nodes, code, said):
    model = "model_name_or_path=embedded/smollm2-135m-instruct"  # no warm-up, whose batch would be the first
    run = ["1", "teacher_rlt_tiny", model, "train_batch_size=32", "per_device_train_batch_size=4", "dry_run=true"]
    done = launch("launch.py", *run, NNODES=nodes, NODE_RANK="0", MASTER_ADDR="host0")
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


def test_restarts_are_for_the_launcher():
    done = launch("train.py", "teacher_rlt_tiny", "restarts=1", "dry_run=true")
    assert done.returncode == 1
    assert "restarts=1 is for ./launch.sh" in done.stderr


@pytest.mark.slow
def test_stopped_in_the_middle_it_saves_and_the_same_command_continues(tiny_run, tmp_path):
    run = [*tiny_run, "max_steps=10", "save_steps=100", "eval_size=0", f"output_dir={tmp_path}"]
    first = start("2", *run)
    wait_until(lambda: ranks_of(first.pid))
    second = launch("launch.py", "2", *run)
    assert second.returncode == 1
    assert "is in use by another run" in second.stderr
    wait_until(lambda: reached(tmp_path, 1))
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=LIMIT_S)
    assert first.returncode == PREEMPTED, said[-3000:]
    assert "the same command continues" in said
    assert not ranks_of(first.pid)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    done = launch("launch.py", "2", *run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {checkpoint}" in done.stderr
    assert "10 steps" in done.stdout


def test_a_lost_terminal_ends_a_run_unless_nohup_said_otherwise():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert stop_signals() == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert stop_signals() == [signal.SIGTERM, signal.SIGINT]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_the_ranks_of_the_life_before_said_is_kept(tmp_path):
    script = "import os; os.write(2, (os.environ['SAYS'] + ' ' + os.environ['RANK']).encode())"
    command = [sys.executable, "-c", script]
    for says in ("first", "second", "third"):
        assert run_ranks(command, 2, tmp_path, {"SAYS": says}, tmp_path) == 0
    said = {path.name: path.read_text().strip() for path in tmp_path.iterdir()}
    assert said == {
        **{f"rank-{rank}.log": f"third {rank}" for rank in range(2)},
        **{f"rank-{rank}.before.log": f"second {rank}" for rank in range(2)},
    }


def test_when_one_rank_is_killed_all_end_and_it_is_named_last(tiny_run, tmp_path):
    run = [*tiny_run, "max_steps=50", "eval_size=0", f"output_dir={tmp_path}"]
    launcher = start("2", *run)
    wait_until(lambda: reached(tmp_path, 1))
    ranks = {int(_environment_of(pid)["RANK"]): pid for pid in ranks_of(launcher.pid)}
    os.kill(ranks[1], signal.SIGKILL)
    _, said = launcher.communicate(timeout=END_LIMIT_S)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "rank 1 ended first, with signal SIGKILL" in said.rstrip().split("\n\n")[-1]
    assert not ranks_of(launcher.pid)


def test_what_a_user_did_is_not_tried_again(tmp_path):
    command = [sys.executable, "-c", f"import sys; sys.exit('error: no such thing' and {REFUSED})"]
    assert run_ranks(command, 1, tmp_path, {}, tmp_path, restarts=3) == 1
    assert not (tmp_path / "rank-0.before.log").exists()


def test_a_crash_is_tried_again_as_often_as_asked(tmp_path):
    script = "import os, sys; sys.exit(f'life {os.environ[\"TORCHELASTIC_RESTART_COUNT\"]}')"
    assert run_ranks([sys.executable, "-c", script], 1, tmp_path, {}, tmp_path, restarts=2) == 1
    assert "life 2" in (tmp_path / "rank-0.log").read_text()
    assert "life 1" in (tmp_path / "rank-0.before.log").read_text()


def test_ranks_do_not_outlive_a_killed_launcher(tiny_run, tmp_path):
    launcher = start("2", *tiny_run, "max_steps=50", "eval_size=0", f"output_dir={tmp_path}")
    wait_until(lambda: len(ranks_of(launcher.pid)) == 2)
    launcher.kill()
    launcher.communicate(timeout=LIMIT_S)
    wait_until(lambda: not ranks_of(launcher.pid), 30)


def _environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
