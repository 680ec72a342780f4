"""Generation servers of a run: started on devices of their own, started again when they die, ended with the run."""

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from rlt.launching.environment import free_port
from rlt.launching.lifetime import end_followers, end_group, end_of
from rlt.places import KEY_VARIABLE

LOOPBACK = "127.0.0.1"
HOST_VARIABLE, PORT_VARIABLE = "SERVER_HOST", "SERVER_PORT"  # where servers listen, when not on the loopback address
RESTARTS = 3
END_LIMIT_S = 20

logger = logging.getLogger("rlt")


@dataclass
class Servers:
    """One server for each entry of `devices` (the value of CUDA_VISIBLE_DEVICES there; empty: the CPU).

    Args:
        threads: of each, on a CPU.
        plan_file: what `rlt.generation.served.vllm_server` reads.
        host: the address at which they listen.
        first_port: of the first, the others' follow; 0: any that is free.
        key: what they ask for.
    """

    devices: list[str]
    threads: int
    logs: Path
    plan_file: Path
    host: str = LOOPBACK
    first_port: int = 0
    key: str = field(default_factory=lambda: os.environ.get(KEY_VARIABLE) or secrets.token_hex(16))

    def __post_init__(self):
        self.ports = [free_port(self.first_port and self.first_port + i, self.host) for i in range(len(self.devices))]
        self.closing, self.given_up = threading.Event(), threading.Event()
        self.processes: dict[int, subprocess.Popen] = {}
        self.watching: list[threading.Thread] = []
        self.lock = threading.Lock()  # no server starts once they are being closed
        self.failed: int | None = None

    @property
    def urls(self) -> list[str]:
        return [f"http://{self.host}:{port}" for port in self.ports]

    def start(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        for number in range(len(self.devices)):
            self._start_one(number)
            thread = threading.Thread(target=self._keep_alive, args=(number,), daemon=True)
            thread.start()
            self.watching.append(thread)

    def _log(self, number: int) -> Path:
        return self.logs / f"server-{number}.log"

    def _start_one(self, number: int) -> None:
        place = [str(self.ports[number]), self.host, str(os.getpid())]
        with self.lock, self._log(number).open("ab") as log:
            if self.closing.is_set():
                return
            self.processes[number] = subprocess.Popen(
                [sys.executable, "-m", "rlt.generation.served.vllm_server", str(self.plan_file), *place],
                env={
                    **os.environ,
                    KEY_VARIABLE: self.key,
                    "CUDA_VISIBLE_DEVICES": self.devices[number],
                    "OMP_NUM_THREADS": str(self.threads),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _keep_alive(self, number: int) -> None:
        for restart in range(RESTARTS + 1):
            process = self.processes[number]
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            end_followers(process)  # while its id is still its own
            code = process.wait()
            if self.closing.is_set():
                return
            if restart == RESTARTS:
                break
            logger.warning("server %d ended with code %d (%s), and is started again", number, code, self._log(number))
            time.sleep(restart)
            self._start_one(number)
        self.failed = number
        self.given_up.set()

    def last_words(self) -> str:
        assert self.failed is not None  # one has given up
        log = self._log(self.failed)
        return f"\nserver {self.failed} ended {RESTARTS + 1} times (all of it in {log}):\n{end_of(log)}\n"

    def close(self, well: bool = True) -> None:
        with self.lock:
            self.closing.set()
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                if process.returncode is None:
                    os.kill(process.pid, signal.SIGTERM)
        give_up = time.monotonic() + END_LIMIT_S
        for thread in self.watching:
            thread.join(max(0.0, give_up - time.monotonic()))
        for process in self.processes.values():
            end_group(process)
