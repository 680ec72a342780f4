"""A real server that tests kill and start again at the same address, with the same state."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from conftest import ROOT

KEY = "tml-aaaaaaaaaaaa"
START_S, END_S = 90, 30


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def unigram_folder(folder: Path) -> str:
    """What the server takes for a model, of which the worker of numbers needs nothing."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    return str(folder)


class Mortal:
    """
    Args:
        flags: of the worker of numbers; None: the real one.
    """

    def __init__(self, folder: Path, base_model: str, flags: dict | None = None, key: str = KEY, words=(), **variables):
        self.folder, self.port = folder, free_port()
        program = (
            [str(ROOT / "serve.py")] if flags is None else [str(ROOT / "tests/serving_real.py"), json.dumps(flags)]
        )
        own = [f"port={self.port}", f"state_dir={folder / 'state'}", f"base_models=[{base_model}]", *words]
        self.command = [sys.executable, *program, *own]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        self.environment |= {"RLT_API_KEY": key, **variables}
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def begin(self) -> None:
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environment, cwd=self.folder)

    def start(self) -> None:
        self.begin()
        end = time.monotonic() + START_S
        while not self._listens():
            assert self.process.poll() is None and time.monotonic() < end, self.log[-3000:]
            time.sleep(0.02)

    def _listens(self) -> bool:
        with socket.socket() as asked:
            return asked.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(END_S)

    def __enter__(self) -> "Mortal":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Killer(threading.Thread):
    """Kills the server as often as it is told, at moments of the clients' work that a seed draws.

    Args:
        ticks: that the clients make in all; the moments lie between them.
    """

    def __init__(self, server: Mortal, kills: int, ticks: int, seed: int, most_s: float) -> None:
        super().__init__(daemon=True)
        self.server, self.chance = server, random.Random(seed)
        self.moments = sorted(self.chance.sample(range(ticks), kills))
        self.most_s = most_s  # that a kill comes after its tick
        self.ticks = threading.Semaphore(0)
        self.kills = 0

    def run(self) -> None:
        seen = 0
        for moment in self.moments:
            while seen <= moment:
                self.ticks.acquire()
                seen += 1
            time.sleep(self.chance.uniform(0, self.most_s))
            self.server.kill()
            self.kills += 1
            if self.chance.random() < 0.3:  # once more before it serves
                self.server.begin()
                time.sleep(self.chance.uniform(0.1, 2))
                self.server.kill()
            self.server.start()
