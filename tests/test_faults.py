"""Fault runs: `./run_tests.sh -m slow tests/test_faults.py`. Kills and signals come at marked points of a step.

After each: nothing is left, and the same command ends where the undisturbed run does.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import torch
from conftest import launch
from safetensors.torch import load_file
from test_launch import END_LIMIT_S, LIMIT_S, ranks_of, reached, start, wait_until

from rlt.generation.served.client import Server, ServerError
from rlt.launching.lifetime import PREEMPTED
from rlt.runs.manifest import damage_of

pytestmark = pytest.mark.slow
PHASES = ("generation", "scoring", "backward", "saving")
STEPS = ["max_steps=4", "save_steps=1", "eval_size=0", "save_total_limit=null", "use_vllm=false"]


def run_of(tiny_run, folder: Path) -> list[str]:
    return ["2", *tiny_run, *STEPS, f"output_dir={folder}"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_ends_as(folder: Path, undisturbed: Path) -> None:
    ours, theirs = weights(folder), weights(undisturbed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def undisturbed(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = launch("launch.py", *run_of(tiny_run, folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def continue_to_the_end(tiny_run, folder: Path, undisturbed: Path) -> subprocess.CompletedProcess:
    done = launch("launch.py", *run_of(tiny_run, folder))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_ends_as(folder, undisturbed)
    return done


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_rank(phase, rank, tiny_run, undisturbed, tmp_path):
    launcher = start(*run_of(tiny_run, tmp_path), RLT_KILL_AT=f"{phase}:3", RLT_KILL_RANK=rank)
    wait_until(lambda: reached(tmp_path, 2))
    _, said = launcher.communicate(timeout=END_LIMIT_S)
    assert launcher.returncode == 128 + signal.SIGKILL, said[-3000:]
    assert f"rank {rank} ended first, with signal SIGKILL" in said
    assert not ranks_of(launcher.pid)
    continue_to_the_end(tiny_run, tmp_path, undisturbed)


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_rank_is_started_again_by_the_same_command(phase, tiny_run, undisturbed, tmp_path):
    kill = {"RLT_KILL_AT": f"{phase}:3", "RLT_KILL_RANK": "1"}
    done = launch("launch.py", *run_of(tiny_run, tmp_path), "restarts=1", **kill)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 1 ended first, with signal SIGKILL" in done.stderr
    assert f"resuming from {tmp_path / 'checkpoint-'}" in done.stderr
    assert_ends_as(tmp_path, undisturbed)


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_to_the_launcher(phase, number, tiny_run, undisturbed, tmp_path):
    stopped = launch("launch.py", *run_of(tiny_run, tmp_path), RLT_SIGNAL_AT=f"{phase}:2:{number}")
    assert stopped.returncode == PREEMPTED, stopped.stderr[-3000:]
    assert "the same command continues" in stopped.stderr
    assert not (tmp_path / "COMPLETE").exists()
    continue_to_the_end(tiny_run, tmp_path, undisturbed)


@pytest.mark.parametrize("name", ["training_state.pt", "model.safetensors", "rollouts-1.pt"])
def test_a_checkpoint_that_was_cut_short(name, tiny_run, undisturbed, tmp_path):
    stopped = launch("launch.py", *run_of(tiny_run, tmp_path), RLT_SIGNAL_AT="generation:3:SIGTERM")
    assert stopped.returncode == PREEMPTED, stopped.stderr[-3000:]
    newest = max(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    os.truncate(newest / name, 100)
    done = continue_to_the_end(tiny_run, tmp_path, undisturbed)
    assert f"{newest} is damaged ({name} has 100 of" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk(tiny_run, undisturbed, tmp_path):
    size = sum(path.stat().st_size for path in (undisturbed / "checkpoint-1").rglob("*") if path.is_file())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={10 * size}", "rlt-test", tmp_path], check=True, timeout=10)
    try:
        folder, filling = tmp_path / "run", tmp_path / "filling"
        launcher = start(*run_of(tiny_run, folder))
        wait_until(lambda: ranks_of(launcher.pid))  # the plan has found enough room
        fill(filling, room=size * 3 // 2)  # a checkpoint, but not a second
        _, said = launcher.communicate(timeout=LIMIT_S)
        assert launcher.returncode not in (0, PREEMPTED)
        assert "No space left" in said
        (checkpoint,) = folder.glob("checkpoint-*")
        assert checkpoint.name == "checkpoint-1" and damage_of(checkpoint) is None
        filling.unlink()
        done = continue_to_the_end(tiny_run, folder, undisturbed)
        assert f"resuming from {checkpoint}" in done.stderr
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True, timeout=10)


def fill(file: Path, room: int) -> None:
    """Make a file that leaves `room` bytes of its disk."""
    with file.open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, shutil.disk_usage(file.parent).free - room)


@pytest.mark.parametrize("moment", ["generation", "between"])
def test_a_killed_server(moment, tiny_run, tmp_path):
    run = [*tiny_run, "use_vllm=true", "max_steps=4", "eval_size=0", "save_steps=100"]
    folders = {name: tmp_path / name for name in ("quiet", "killed")}
    quiet = launch("launch.py", "--servers=1", "1", *run, f"output_dir={folders['quiet']}")
    assert quiet.returncode == 0, quiet.stderr[-3000:]
    launcher = start("--servers=1", "1", *run, f"output_dir={folders['killed']}")
    wait_until(lambda: reached(folders["killed"], 1 if moment == "between" else 2))
    os.kill(_server_of(launcher.pid), signal.SIGKILL)
    _, said = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, said[-3000:]
    assert "is started again" in said
    assert_ends_as(folders["killed"], folders["quiet"])


def _server_of(launcher: int) -> int:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = (path.parent / "cmdline").read_bytes().decode().split("\0")
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == launcher and "vllm.entrypoints.openai.api_server" in words:
            return int(path.parent.name)
    raise AssertionError("no server")


def test_a_launcher_that_is_killed_leaves_nothing_of_its_servers(tiny_run, tmp_path):
    """Neither vLLM's engine, which the kernel does not end with it, nor weights in memory, nor its folder."""
    run = [
        *tiny_run,
        "use_vllm=true",
        "max_steps=400",
        "eval_size=0",
        "save_steps=1000",
        f"output_dir={tmp_path / 'run'}",
    ]
    with TemporaryDirectory(dir="/dev/shm") as place:
        launcher = start("--servers=1", "1", *run, TMPDIR=place)
        wait_until(lambda: reached(tmp_path / "run", 1))
        begun = psutil.Process(launcher.pid).children(recursive=True)
        assert any("EngineCore" in process.name() for process in begun)
        launcher.kill()
        launcher.communicate(timeout=END_LIMIT_S)
        gone, left = psutil.wait_procs(begun, END_LIMIT_S)
        assert not left
        assert not [path for path in Path(place).iterdir() if "wandb" not in path.name]  # W&B makes them at its import


class Refusing(BaseHTTPRequestHandler):
    """A server that is up and answers every request with 500, or too late."""

    delay_s = 0.0

    def do_GET(self):
        time.sleep(self.delay_s)
        self.send_response(500)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(("delay_s", "said"), [(0.0, "answered 500"), (3.0, "timed out")])
def test_a_server_that_refuses_or_is_late(delay_s, said):
    class Handler(Refusing):
        pass

    Handler.delay_s = delay_s
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        server = Server(f"http://127.0.0.1:{http.server_port}", limit_s=1.0)
        with pytest.raises(ServerError, match=said):
            server.complete([1, 2], 1, 0, {"max_tokens": 4})
        http.shutdown()


def test_a_server_that_never_comes_up():
    with pytest.raises(ServerError, match="is not ready after 2 s"):
        Server("http://127.0.0.1:9", limit_s=1.0).wait_until_ready(2.0)


def test_metrics_name_the_slowest_rank(undisturbed):
    step = next(
        r for r in map(json.loads, (undisturbed / "metrics.jsonl").read_text().splitlines()) if "ranks/slowest" in r
    )
    assert step["ranks/slowest"] in (0.0, 1.0)
    assert 0 <= step["ranks/waiting_share"] < 1
    assert step["ranks/host_gib"] > 0
