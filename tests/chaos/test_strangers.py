"""What others can reach of a run on one machine, and what they can do to it."""

import secrets
import socket
import time

import psutil
import pytest
from figures import record
from test_launch import start, wait_until
from test_servers import served, server  # noqa: F401  # fixtures

from rlt.launching.connection import open_client

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LINES = 10_000


def listeners(launcher: int) -> set[tuple[str, int]]:
    """Addresses and ports at which a process or what it started listens."""
    found = set()
    for process in [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]:
        try:
            here = process.net_connections("inet")
        except psutil.Error:  # it has just ended
            continue
        found |= {(c.laddr.ip, c.laddr.port) for c in here if c.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.parametrize("first", [("2",), ("--servers=1", "1")])
def test_nothing_listens_beyond_the_loopback(first, tiny_run, tmp_path):
    steps = ["max_steps=6", "save_steps=1000", "eval_size=0", "use_vllm=true", f"output_dir={tmp_path / 'run'}"]
    launcher, seen = start(*first, *tiny_run, *steps, stderr=tmp_path / "log"), set()
    while launcher.poll() is None:
        seen |= listeners(launcher.pid)
        time.sleep(0.1)
    assert launcher.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    beyond = {place for place in seen if not place[0].startswith("127.")}
    record("9. listeners beyond the loopback", **{f"launch.py {' '.join(first)}": f"{len(beyond)} of {len(seen)}"})
    assert seen and not beyond


def test_every_route_of_a_server_asks_for_the_key(served, server):  # noqa: F811
    """All that its description names, with every method, and a few that it does not."""
    served.sync_weights()
    with open_client(server.urls[0], 20) as client:
        key = {"Authorization": f"Bearer {server.key}"}
        paths = client.get("/openapi.json", headers=key).json()["paths"]
        asked = [(method.upper(), path) for path, methods in paths.items() for method in methods]
        asked += [
            ("GET", path) for path in ("/metrics", "/docs", "/openapi.json", "//v1/models", "/health/../v1/models")
        ]
        answers = {(m, p): client.request(m, p, json={} if m == "POST" else None).status_code for m, p in asked}
    opened = [place for place, code in answers.items() if code != 401 and place[1] != "/health"]
    record("8. strangers", routes_without_the_key=f"{len(opened)} of {len(answers)} answer")
    assert not opened and len(answers) > 20


def test_ten_thousand_lines_of_nonsense_do_not_end_a_run(tiny_run, tmp_path):
    """At each port at which a run on two processes listens, in connections of a hundred lines, some left open."""
    steps = ["max_steps=200", "save_steps=1000", "eval_size=0", "use_vllm=false", f"output_dir={tmp_path / 'run'}"]
    launcher = start("2", *tiny_run, *steps, stderr=tmp_path / "log")
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 2)
    ports = sorted({port for _, port in listeners(launcher.pid)})
    ranks = [p for p in psutil.Process(launcher.pid).children() if "rlt.commands.rank" in p.cmdline()]
    before = max(p.memory_info().rss for p in ranks)
    held = []
    for number in range(LINES // 100):
        try:
            stranger = socket.create_connection(("127.0.0.1", ports[number % len(ports)]), timeout=2)
            stranger.sendall(b"".join(secrets.token_bytes(60) + b"\n" for _ in range(100)))
        except OSError:  # it was closed: a good answer
            continue
        held.append(stranger)
    grown = (max(p.memory_info().rss for p in ranks) - before) / 2**20
    done = metrics.read_text().count("\n")
    wait_until(lambda: metrics.read_text().count("\n") >= done + 3 or launcher.poll() is not None, 60)
    alive = launcher.poll() is None
    record("8. strangers", runs_ended_by_nonsense=int(not alive), memory_MiB=f"{max(0.0, grown):.0f}")
    for stranger in held:
        stranger.close()
    launcher.terminate()
    assert alive, (tmp_path / "log").read_text()[-3000:]
    assert launcher.wait(120) == 75
