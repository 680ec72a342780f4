"""The end of a group of processes takes Python's shared memory with it, whoever of the group was killed before."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from test_launch import wait_until

from rlt.launching.lifetime import SHARED_MEMORY, end_abandoned, end_followers, end_group

# A server's group as vLLM makes it: the one that makes a segment, and one that reads it and hears no SIGTERM.
GROUP = """
import multiprocessing, os, signal, time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory

def make(names):
    made = SharedMemory(create=True, size=4096)
    names.put((os.getpid(), made.name))
    time.sleep(600)

def read(name, ready):
    resource_tracker.register = lambda *_: None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    read = SharedMemory(name)
    ready.set()
    time.sleep(600)

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    names, ready = spawn.Queue(), spawn.Event()
    spawn.Process(target=make, args=[names]).start()
    maker, name = names.get()
    spawn.Process(target=read, args=[name, ready]).start()
    ready.wait()
    print(maker, name, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def group(tmp_path):
    """A leader, who made the segment, and the segment."""
    script = tmp_path / "group.py"
    script.write_text(GROUP)
    leader = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert leader.stdout is not None
    maker, name = leader.stdout.readline().split()
    segment = SHARED_MEMORY / name
    assert segment.exists()
    yield leader, int(maker), segment
    segment.unlink(missing_ok=True)
    leader.wait(10)


def kill_leader_and_wait(leader: subprocess.Popen, _: int) -> None:
    leader.kill()
    wait_until(lambda: psutil.Process(leader.pid).status() == psutil.STATUS_ZOMBIE, 10)


@pytest.mark.parametrize(
    ("before", "end"),
    [
        (lambda *_: None, end_group),
        (lambda _, maker: os.kill(maker, signal.SIGKILL), end_group),
        (kill_leader_and_wait, end_followers),
        (kill_leader_and_wait, lambda leader: end_abandoned(leader.pid)),
    ],
    ids=["a group", "one whose maker was killed", "followers", "an abandoned group"],
)
def test_a_group_leaves_no_shared_memory(before, end, group):
    leader, maker, segment = group
    members = [process for process in psutil.process_iter() if os.getpgid(process.pid) == leader.pid]
    assert len(members) == 4  # with Python's resource tracker
    before(leader, maker)
    end(leader)
    _, living = psutil.wait_procs([process for process in members if process.pid != leader.pid], 10)
    assert not living
    assert not segment.exists()
