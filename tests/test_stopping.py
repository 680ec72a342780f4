"""A run that is asked to stop: where it leaves a step, what it has then, and that it goes on as if it had not been."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import torch
from conftest import ROOT, build, launch
from test_launch import ranks_of, wait_until

from rlt.launching.lifetime import PREEMPTED
from rlt.planning.grace import warn_of_short_grace
from rlt.runs.manifest import last_checkpoint
from trainers.stopping import SaveByMinutes, StopTogether

STEPS = 3
# Two micro-batches a step, so that a step asks five times: before each, behind its generation, and at its end. With an
# aggregation of four, every second step trains on completions that it has not made.
RUN = [
    "eval_size=0",
    "max_completion_length=8",
    "save_steps=100",
    "train_batch_size=8",
    "per_device_train_batch_size=4",
    "learning_rate=1e-3",
]


class AskedAt:
    """In the place of a signal: some rank was asked before the `place`-th question of all."""

    def __init__(self, place: int | None):
        self.place, self.times = place, 0

    def begin(self) -> None:
        """Signals are none of its business."""

    def asked_anywhere(self) -> bool:
        self.times += 1
        return self.place is not None and self.times >= self.place


def life(run, folder, asked_at: int | None = None, steps: int = STEPS):
    trainer, _ = build(run, folder, *RUN, f"max_steps={steps}")
    trainer.together = StopTogether(AskedAt(asked_at), grace_s=600.0)
    trainer.add_callback(trainer.together)
    checkpoint = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


@pytest.mark.parametrize("aggregation", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_that_is_given_up_is_made_again_bit_for_bit(aggregation, tiny_run, tmp_path, in_root):
    run = [*tiny_run, f"generation_aggregation_steps={aggregation}"]
    straight = life(run, tmp_path / "straight")
    places = straight.together.stop.times
    assert straight.state.global_step == STEPS
    for place in range(2, places, 3):
        folder = tmp_path / str(place)
        stopped = life(run, folder, place)
        assert stopped.together.stopped
        assert stopped.state.global_step < STEPS
        saved = last_checkpoint(folder)
        assert (saved.name if saved else "checkpoint-0") == f"checkpoint-{stopped.state.global_step}"
        resumed = life(run, folder)
        assert resumed.state.num_input_tokens_seen == straight.state.num_input_tokens_seen
        for name, parameter in straight.model.named_parameters():
            assert torch.equal(parameter, dict(resumed.model.named_parameters())[name]), (place, name)


def test_a_batch_that_was_written_ahead_is_not_given_up(tiny_run, tmp_path, in_root):
    trainer, _ = build(tiny_run, tmp_path, *RUN, "max_steps=1")
    trainer.together = StopTogether(AskedAt(1), grace_s=600.0)
    trainer.gives_up_steps = False  # as with overlap_generation
    trainer.leave_if_asked()
    assert trainer.together.stop.times == 0


def test_checkpoints_by_minutes(tiny_run, tmp_path, in_root):
    trainer, _ = build(tiny_run, tmp_path, *RUN, "max_steps=3", "save_total_limit=null")
    trainer.add_callback(SaveByMinutes(1e-9))
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]


def test_a_step_longer_than_the_grace_is_said(tiny_run, tmp_path, in_root, caplog):
    trainer, settings = build(tiny_run, tmp_path, *RUN, "max_steps=2")
    trainer.together = StopTogether(AskedAt(None), grace_s=1e-6)
    trainer.add_callback(trainer.together)
    with caplog.at_level(logging.WARNING, logger="rlt"):
        trainer.train()
    assert "stop_grace_s is 0: let the signal come earlier (Slurm: --signal=TERM@" in caplog.text


@pytest.mark.parametrize(("update_s", "lines"), [(1300.0, 1), (1100.0, 0)])
def test_the_plan_knows_a_long_step_of_an_earlier_life(update_s, lines, tmp_path, caplog):
    """Two micro-batches of 650 s are more than 600, two of 550 s are not."""

    class Settings:
        output_dir, stop_grace_s = str(tmp_path), 600.0

    row = {"step": 1, "generation/seconds": 500.0, "scoring/seconds": 20.0, "update/seconds": update_s}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    warn_of_short_grace(Settings, accumulation_steps=2)
    assert len(caplog.records) == lines
    if lines:
        assert (
            "may take 650 s, by its last step, and stop_grace_s=600: let the signal come earlier (Slurm" in caplog.text
        )


BEGUN = ["teacher_rlt_tiny", "output_dir={folder}"]
DOORS = [["train.py", *BEGUN], ["launch.py", "2", *BEGUN], ["prepare.py", "prepare_tiny", BEGUN[1]]]
DOORS += [["score.py", "input=rows.jsonl", "output={folder}"], ["serve.py", "state_dir={folder}"]]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door[0])
def test_a_signal_while_a_command_still_imports_ends_it_with_75(door, tmp_path):
    script, *words = (word.format(folder=tmp_path / "run") for word in door)
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", str(ROOT / script), *words], stderr=subprocess.PIPE, text=True
    )
    try:
        for line in process.stderr:
            if "rlt.survival.early" in line:  # it listens from here on
                break
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(30) == PREEMPTED
        assert not (tmp_path / "run").exists()
    finally:
        process.kill()


@pytest.mark.parametrize("arguments", [["save_minutes=0"], ["stop_grace_s=0"]])
def test_what_cannot_be_is_refused(arguments, tmp_path):
    done = launch("train.py", "teacher_rlt_tiny", *arguments, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert f"error: {arguments[0]}" in done.stderr and "must be positive" in done.stderr


def test_a_second_signal_does_not_change_the_code_of_a_command_that_is_ending():
    """It comes when the interpreter has given up its own handlers: the kernel would end the process by it."""
    script = (
        "import os, signal, sys\n"
        "from rlt.survival.early import end_when_asked\n"
        "end_when_asked()\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.SIGTERM): kill(me, number)\n"
        "sys.last_of_all = Last()\n"
        "sys.exit(75)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == PREEMPTED


@pytest.mark.parametrize("then", ["stop.begin()", "raise RuntimeError('the engine failed')"])
def test_a_library_that_takes_the_exception_of_a_signal_does_not_keep_the_run_from_ending(then):
    script = (
        "import os, signal\n"
        "from rlt.survival.stop_signals import StopOnSignal\n"
        "with StopOnSignal() as stop:\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except SystemExit:\n"
        "        pass\n"
        f"    {then}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, timeout=60, capture_output=True)
    assert done.returncode == PREEMPTED, done.stderr


def test_once_a_run_has_begun_a_signal_is_noted():
    script = (
        "import os, signal\n"
        "from rlt.survival.stop_signals import StopOnSignal\n"
        "with StopOnSignal() as stop:\n"
        "    stop.begin()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.asked\n"
        "raise SystemExit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, timeout=60).returncode == 3


class NotReady(BaseHTTPRequestHandler):
    """A server that still loads."""

    def do_GET(self) -> None:
        self.server.asked.set()  # pyrefly: ignore[missing-attribute]
        self.send_error(503)

    def log_message(self, format, *args) -> None:
        pass


@pytest.fixture
def loading_server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), NotReady)
    server.asked = threading.Event()  # pyrefly: ignore[missing-attribute]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def assert_ends_at_once(command: list[str], run: list[str], folder: Path, is_loading: Callable) -> None:
    """A SIGTERM once `is_loading(process id)` holds: exit 75, nothing saved, nothing left."""
    with TemporaryDirectory(dir="/dev/shm") as place, (folder / "log").open("w") as log:
        environment = {**os.environ, "TMPDIR": place, "RLT_SERVER_KEY": "k" * 16}
        words = [sys.executable, str(ROOT / command[0]), *command[1:], *run, f"output_dir={folder / 'run'}"]
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        said = folder / "log"
        try:
            wait_until(lambda: is_loading(process.pid) or process.poll() is not None)
            assert process.poll() is None, said.read_text()[-3000:]
            started = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == PREEMPTED, said.read_text()[-3000:]
            _, left = psutil.wait_procs(started, 5)
            assert left == []
            assert [path.name for path in Path(place).glob("rlt-*")] == []
        finally:
            process.kill()
    assert "Traceback" not in said.read_text()
    assert not list((folder / "run").glob("checkpoint-*"))


DOORS = [["train.py"], pytest.param(["launch.py", "2"], marks=pytest.mark.slow)]


@pytest.mark.parametrize("door", DOORS)
def test_a_signal_while_servers_are_waited_for_ends_the_run_at_once(door, loading_server, tiny_run, tmp_path):
    place = f"http://127.0.0.1:{loading_server.server_port}"
    run = [*tiny_run, "use_vllm=true", "use_vllm_server=true", f"vllm_server_base_url=[{place}]"]
    assert_ends_at_once(door, run, tmp_path, lambda _: loading_server.asked.is_set())


def begun_by(pid: int) -> list[str]:
    """Names and command lines of what a process has started."""
    lines = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            lines.append(" ".join([child.name(), *child.cmdline()]))
    return lines


def has_a_child_of_its_own(pid: int) -> bool:
    return any("multiprocessing.spawn" in line for line in begun_by(pid))


def has_loaded_vllm(pid: int) -> bool:
    processes = [pid, *ranks_of(pid)]
    return any("/vllm/_" in Path(f"/proc/{each}/maps").read_text() for each in processes)


def has_an_engine_of_a_server(pid: int) -> bool:
    return any("EngineCor" in line for line in begun_by(pid))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("door", "keys", "is_loading"),
    [
        (["train.py"], [], has_loaded_vllm),
        (["launch.py", "2"], [], has_loaded_vllm),
        (["train.py"], ["overlap_generation=true"], has_a_child_of_its_own),
        (["launch.py", "1"], ["overlap_generation=true"], has_a_child_of_its_own),
        (["launch.py", "--servers=1", "1"], [], has_an_engine_of_a_server),
    ],
)
def test_a_signal_while_an_engine_loads_ends_the_run_at_once(door, keys, is_loading, tiny_run, tmp_path):
    assert_ends_at_once(door, [*tiny_run, "use_vllm=true", *keys], tmp_path, is_loading)
