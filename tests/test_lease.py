"""One run at a time has a server, and its door: what is asked with the key, by whom, and of whom nothing is heard."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from conftest import ROOT
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from test_launch import wait_until

from rlt.errors import Refused
from rlt.generation.served import lease
from rlt.generation.served.client import END, Server, ServerError, ServerGone
from rlt.generation.served.guard import KeyGuard
from rlt.generation.served.lease import LEASE_S, Hold, Lease, changes
from rlt.generation.served.silence import SILENCE_S, Silence
from rlt.launching import connection
from rlt.launching.connection import keep_alive
from rlt.launching.environment import listen
from rlt.launching.servers import Servers, answers

KEY = "k" * 16
HOST = socket.gethostname()


class Clock:
    def __init__(self):
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


def test_the_first_that_changes_something_has_the_server_until_it_is_silent():
    now = Clock()
    server = Lease(now)
    assert server.refusal("a", changing=False) is None and server.holder == ""
    assert server.refusal("a", changing=True) is None and server.holder == "a"
    now.s += LEASE_S - 1
    assert server.refusal("b", changing=False) is None  # who only reads is let in, and renews nothing
    assert "is held by another run (a), which asked 299 s ago" in (server.refusal("b", changing=True) or "")
    assert server.refusal("a", changing=False) is None  # renews
    now.s += LEASE_S
    assert server.refusal("b", changing=True) is not None
    now.s += 0.5
    assert server.refusal("b", changing=True) is None and server.holder == "b"
    server.let_go("a")  # which has it no more
    assert server.refusal("a", changing=True) is not None
    server.let_go("b")
    assert server.refusal("a", changing=True) is None


class Engine:
    """What is asked of vLLM's."""

    def __init__(self):
        self.output_processor, self.stats = self, []

    def update_scheduler_stats(self, stats: str) -> None:
        self.stats.append(stats)


def test_an_engine_is_silent_while_it_has_requests_says_nothing_and_takes_no_weights():
    now, engine = Clock(), Engine()
    silence = Silence(now)
    assert silence.of(engine) == 0
    now.s += 100
    assert silence.of(engine) == 0  # nobody has asked for anything
    with silence.asked():
        now.s += 20
        assert silence.of(engine) == 20
        engine.update_scheduler_stats("a step")
        now.s += 5
        assert silence.of(engine) == 5 and engine.stats == ["a step"]
        with silence.asked():
            now.s += 4
        assert silence.of(engine) == 9  # somebody else gave up
        silence.answered()
        assert silence.of(engine) == 0
        silence.paused = True
        now.s += 300
        assert silence.of(engine) == 0
        silence.paused = False
        now.s += 31
        assert silence.of(engine) == 31


def test_a_server_is_ill_whose_engine_is_silent_and_well_again_after_it_spoke(monkeypatch):
    monkeypatch.setenv("RLT_SERVER_KEY", KEY)
    app, now = Starlette(routes=[Route("/health", lambda _: JSONResponse({}))]), Clock()
    engine = app.state.engine_client = Engine()
    app.add_middleware(KeyGuard)
    client = TestClient(app)
    assert client.get("/health").status_code == 200
    guard = app.middleware_stack.app  # behind Starlette's own for errors
    assert isinstance(guard, KeyGuard)
    guard.silence = Silence(now)
    with guard.silence.asked():
        assert client.get("/health").status_code == 200
        now.s += SILENCE_S + 1
        assert client.get("/health").status_code == 503
        engine.update_scheduler_stats("a step")
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "changing"),
    [
        ("POST", "/pause", True),
        ("POST", "/update_weights", True),
        ("POST", "/collective_rpc", True),
        ("POST", "/end", True),
        ("POST", "/v1/completions", False),
        ("GET", "/weight_info", False),
    ],
)
def test_what_is_posted_changes_a_server_but_for_questions(method, path, changing):
    assert changes(method, path) == changing


@pytest.fixture
def guarded(monkeypatch) -> Iterator[str]:
    """An application behind the guard, at a port, as vLLM's is; it has all paths."""
    monkeypatch.setenv("RLT_SERVER_KEY", KEY)
    everything = Route("/{path:path}", lambda _: JSONResponse({"success": True}), methods=["GET", "POST"])
    app = KeyGuard(Starlette(routes=[everything]))
    with socket.create_server(("127.0.0.1", 0)) as held:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [held]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started, 10)
        yield f"http://127.0.0.1:{held.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def test_a_second_run_is_refused_in_a_line_that_names_the_first_until_that_lets_go(guarded):
    first, second = (Server(guarded, holder=f"run {name}, output_dir=/résultats/{name}") for name in "ab")
    hold = Hold([first])
    first.take_weights([], "1")
    with pytest.raises(
        Refused, match=rf"{guarded} is held by another run \(run a, output_dir=/résultats/a on {HOST}\)"
    ) as said:
        second.take_weights([], "2")
    assert "\n" not in str(said.value)
    with pytest.raises(Refused, match="is held by another run"):
        Hold([second])
    assert second.ask("POST", "/v1/completions", {}) == {"success": True}  # weights are the holder's, answers are not
    Hold([Server(guarded, holder="run a, output_dir=/résultats/a")]).close()  # another life of the first
    Hold([second]).close()
    hold.close()


def test_a_hold_is_renewed_while_a_run_asks_nothing(guarded, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "LEASE_S", 0.5)
    hold = Hold([Server(guarded, holder="a")])
    time.sleep(1.0)
    with pytest.raises(Refused, match=f"held by another run \\(a on {HOST}\\)"):
        Server(guarded, holder="b").hold()
    hold.closed.set()  # as if it had been killed
    time.sleep(1.0)
    Server(guarded, holder="b").hold()


def test_a_server_is_asked_for_its_health_without_the_key(monkeypatch):
    monkeypatch.setenv("RLT_SERVER_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url, heard = f"http://127.0.0.1:{listening.getsockname()[1]}", []

        def stranger() -> None:
            for _ in range(2):
                taken, _ = listening.accept()
                with taken:
                    heard.append(taken.recv(4096))
                    taken.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        thread = threading.Thread(target=stranger, daemon=True)
        thread.start()
        Server(url).wait_until_ready(5.0)
        assert answers(url)
        thread.join(5)
    assert len(heard) == 2
    assert not [text for text in heard if KEY.encode() in text or b"uthorization" in text]


@pytest.mark.parametrize("sockets", [None, "long"])
def test_the_port_of_a_server_is_held_from_its_naming_on(sockets, tmp_path):
    folder = tmp_path / ("x" * 120) if sockets else None  # too long a path for a socket's name
    servers = Servers([""], 1, tmp_path, tmp_path / "plan.json", sockets=folder)
    assert servers.urls[0].startswith("http://127.0.0.1:")
    port = int(servers.urls[0].rpartition(":")[2])
    try:
        for options in ([], [socket.SO_REUSEADDR], [socket.SO_REUSEADDR, socket.SO_REUSEPORT]):
            with socket.socket() as thief:
                for option in options:
                    thief.setsockopt(socket.SOL_SOCKET, option, 1)
                with pytest.raises(OSError) as refused:
                    thief.bind(("127.0.0.1", port))
                    thief.listen()
                assert refused.value.errno == errno.EADDRINUSE
    finally:
        servers.close()
    with socket.socket() as later:
        later.bind(("127.0.0.1", port))


def test_what_was_asked_of_a_server_that_died_does_not_meet_the_next(monkeypatch):
    """Its port is held and takes connections while no server runs; who asked has given up."""
    from rlt.generation.served.at_socket import HeldServer

    monkeypatch.setenv("RLT_SERVER_KEY", KEY)

    heard = []

    async def app(scope, receive, send):
        heard.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    with listen(0, "127.0.0.1") as held:
        place = held.getsockname()
        with pytest.raises(ServerError, match="timed out"):
            Server(f"http://127.0.0.1:{place[1]}").ask("POST", END, limit_s=0.2)
        server = HeldServer(uvicorn.Config(app, lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [held]}, daemon=True)
        thread.start()
        Server(f"http://127.0.0.1:{place[1]}").wait_until_ready(20)
        server.should_exit = True
        thread.join(20)
    assert heard == ["/health"]
    with pytest.raises(ServerGone, match="refused"):
        Server(f"http://127.0.0.1:{place[1]}").ask("POST", END)


def test_a_connection_has_a_limit_of_its_own(monkeypatch):
    monkeypatch.setattr(connection, "CONNECT_LIMIT_S", 0.5)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        place = listening.getsockname()
        waiting = [socket.socket() for _ in range(4)]  # who fill its queue: to others it is as a host that is off
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(place)
        begun = time.monotonic()
        with pytest.raises(ServerError, match="timed out"):
            Server(f"http://127.0.0.1:{place[1]}", limit_s=30.0).ask("GET", "/weight_info")
        assert time.monotonic() - begun < 5.0
        for one in waiting:
            one.close()


def test_a_connection_asks_after_a_silent_host_within_a_minute():
    with socket.socket() as ours:
        for option in keep_alive():
            ours.setsockopt(*option)
        idle, each, times, limit_ms = (
            ours.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        )
    assert idle + each * times <= 120 and limit_ms <= 60_000


LOST = """
import os, subprocess, sys, threading, time
os.environ["RLT_SERVER_KEY"] = "k" * 16
from rlt.generation.served.client import Server, ServerError
from rlt.launching import connection
connection.SILENCE_S, connection.PROBE_S = 3, 1
PULL = ["nsenter", f"--target={sys.argv[1]}", "--net", "ip", "link", "set", "rlt-b", "down"]
threading.Timer(1.0, lambda: subprocess.run(PULL, check=True)).start()
begun = time.monotonic()
try:
    Server("http://10.77.0.2:8000").ask("GET", "/weight_info")
except ServerError as error:
    print(error, file=sys.stderr)
    print(f"{time.monotonic() - begun:.1f}")
"""
HOSTS = """set -e
ip link add rlt-a type veth peer name rlt-b netns "$1"
ip address add 10.77.0.1/24 dev rlt-a && ip link set rlt-a up && ip link set lo up
nsenter --target="$1" --net bash -c 'ip address add 10.77.0.2/24 dev rlt-b && ip link set rlt-b up'
exec "$2" -c "$3" "$1"
"""
SILENT = "import socket, time; held = socket.create_server(('0.0.0.0', 8000)); print('', flush=True); time.sleep(60)"


@pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")
def test_a_wait_for_the_answer_of_a_host_that_lost_its_power_ends():
    """Two hosts with a cable between them, which is pulled once the request is sent."""
    command = ["unshare", "--net", sys.executable, "-c", SILENT]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None and server.stdout.readline() == b"\n"
        client = ["unshare", "--net", "bash", "-c", HOSTS, "bash", str(server.pid), sys.executable, LOST]
        done = subprocess.run(client, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    finally:
        server.kill()
        server.wait(10)
    assert done.returncode == 0, done.stderr
    assert 2.0 < float(done.stdout) < 15.0, done.stderr
