"""What another machine can reach of a run, and what its nonsense does to one: from a network namespace of its own."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from figures import record
from test_launch import ranks_of, reached, wait_until
from test_two_machines import HOSTS, hosts, pytestmark, start_one  # noqa: F401  # a fixture; needs root

pytestmark = [*pytestmark, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
PIECES = 10_000
MOST_MIB = 64
LISTENING = "0A"  # in /proc/net/tcp (proc_net_tcp.rst of the kernel)
ROW = "8. strangers on another machine"
STORE_PORT, CONTROL_PORT = 29500, 4999
SCAN = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def is_open(port):
    try:
        socket.create_connection((sys.argv[1], port), 2).close()
    except OSError:
        return False
    return True
with ThreadPoolExecutor(8) as pool:
    found = pool.map(is_open, range(1, 2**16))
    print(json.dumps([port for port, answers in zip(range(1, 2**16), found) if answers]))
"""


def on(host: str, *command: str, limit_s: float = 240):
    """What a Python command says as JSON, on a host."""
    words = ["ip", "netns", "exec", host, sys.executable, *command]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True, timeout=limit_s).stdout)


def listening(pid: int) -> set[tuple[bool, int]]:
    """(whether it is at the loopback address, port) of all listeners of a process's network namespace."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            place, _, state = line.split()[1:4]
            address, _, port = place.partition(":")
            if state == LISTENING:
                found.add((address == "0100007F" or address.endswith("01000000"), int(port, 16)))
    return found


def memory_of(launcher: int) -> dict[int, float]:
    """MiB that a launcher and its ranks hold, by process."""
    return {pid: psutil.Process(pid).memory_info().rss / 2**20 for pid in (launcher, *ranks_of(launcher))}


@pytest.mark.parametrize("first", [("2",), ("--servers=1", "1")])
def test_another_machine_reaches_nothing_of_a_run_on_one(first, hosts, tiny_run, tmp_path):  # noqa: F811
    steps = ["max_steps=400", "save_steps=1000", "eval_size=0", "use_vllm=true", f"output_dir={tmp_path / 'run'}"]
    launcher = subprocess.Popen(
        ["ip", "netns", "exec", hosts[0], sys.executable, str(ROOT / "launch.py"), *first, *tiny_run, *steps],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    control = start_control(hosts[0])
    try:
        wait_until(lambda: reached(tmp_path / "run", 2) or launcher.poll() is not None)
        assert launcher.poll() is None, launcher.communicate()[1][-3000:]
        here = listening(launcher.pid)
        found = on(hosts[1], "-c", SCAN, HOSTS[hosts[0]])
    finally:
        control.kill()
        launcher.send_signal(signal.SIGTERM)
        _, said = launcher.communicate(timeout=120)
    assert launcher.returncode == 75, said[-3000:]
    record(ROW, **{f"reach of launch.py {' '.join(first)}": f"{len(found) - 1} of {len(here) - 1} ports"})
    assert found == [CONTROL_PORT]
    assert len(here) > 1


def start_control(host: str) -> subprocess.Popen:
    """A listener that the search is to find."""
    script = f"import socket, time; s = socket.create_server(('0.0.0.0', {CONTROL_PORT})); time.sleep(600)"
    return subprocess.Popen(["ip", "netns", "exec", host, sys.executable, "-c", script])


def throw_at(host: str, address: str, pieces: int, ports: set[int]) -> dict[str, int]:
    return on(host, str(HERE / "nonsense.py"), address, str(pieces), *map(str, sorted(ports)))


def logs_of(folder: Path) -> float:
    """MiB in the logs of a run's ranks."""
    return sum(path.stat().st_size for path in (folder / "logs").iterdir()) / 2**20


def test_nonsense_from_another_machine_ends_no_run_of_two(hosts, tiny_run, tmp_path):  # noqa: F811
    """At the launchers' meeting before the second comes, and at every port that is open beyond the loopback while they
    train; nobody reads meanwhile what they say."""
    run = [*tiny_run, "max_steps=400", "save_steps=1000", "eval_size=0", "use_vllm=false", f"output_dir={tmp_path}"]
    first = start_one(0, hosts[0], *run)
    address = HOSTS[hosts[0]]
    wait_until(lambda: (False, STORE_PORT) in listening(first.pid) or first.poll() is not None)
    waiting = memory_of(first.pid)
    early = throw_at(hosts[1], address, PIECES // 2, {STORE_PORT})
    assert first.poll() is None, first.communicate()[1][-3000:]
    grown = [mib - waiting[pid] for pid, mib in memory_of(first.pid).items() if pid in waiting]
    second = start_one(1, hosts[1], *run)
    wait_until(lambda: reached(tmp_path, 2) or first.poll() is not None)
    assert first.poll() is None, first.communicate()[1][-3000:]
    open_ports = {port for is_loopback, port in listening(first.pid) if not is_loopback}
    training = memory_of(first.pid)
    late = throw_at(hosts[1], address, PIECES // 2, open_ports)
    done = (tmp_path / "metrics.jsonl").read_text().count("\n")
    wait_until(lambda: reached(tmp_path, done + 2) or first.poll() is not None, 120)
    alive = first.poll() is None and second.poll() is None
    if alive:
        grown += [mib - training[pid] for pid, mib in memory_of(first.pid).items()]
    for launcher in (first, second):
        launcher.send_signal(signal.SIGTERM)
    said = [launcher.communicate(timeout=120)[1] for launcher in (first, second)]
    pieces = f"{early['taken'] + late['taken']} pieces at {len(open_ports)} ports"
    record(
        ROW,
        thrown=pieces,
        runs_of_two_ended=int(not alive),
        memory_MiB=f"{max(0.0, *grown):.0f}",
        logs_MiB=f"{logs_of(tmp_path):.0f}",
    )
    assert alive, said[0][-3000:]
    assert [launcher.returncode for launcher in (first, second)] == [75, 75], said[0][-3000:]
    assert early["refused"] == 0
    assert max(grown) < MOST_MIB
