"""Generation servers of a run: started on devices of their own, started again when they die, ended with the run."""

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from generation.guard import KEY_VARIABLE
from launching.environment import free_port
from launching.lifetime import end_followers, end_group

LOOPBACK = "127.0.0.1"
RESTARTS = 3
END_LIMIT_S = 20

logger = logging.getLogger(__name__)


@dataclass
class Servers:
    """One server for each entry of `devices` (the value of CUDA_VISIBLE_DEVICES there; empty: the CPU)."""

    devices: list[str]
    threads: int  # of each, on a CPU
    logs: Path
    ports: list[int] = field(default_factory=list)
    key: str = field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self):
        self.ports = [free_port() for _ in self.devices]
        self.closing = threading.Event()
        self.processes: dict[int, subprocess.Popen] = {}
        self.threads_watching: list[threading.Thread] = []

    @property
    def urls(self) -> list[str]:
        return [f"http://{LOOPBACK}:{port}" for port in self.ports]

    def start(self, plan_file: Path) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        for number in range(len(self.devices)):
            self._start_one(number, plan_file)
            watching = threading.Thread(target=self._keep_alive, args=(number, plan_file), daemon=True)
            watching.start()
            self.threads_watching.append(watching)

    def _start_one(self, number: int, plan_file: Path) -> None:
        place = [str(self.ports[number]), LOOPBACK, str(os.getpid())]
        with (self.logs / f"server-{number}.log").open("ab") as log:
            self.processes[number] = subprocess.Popen(
                [sys.executable, "-m", "generation.serve", str(plan_file), *place],
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

    def _keep_alive(self, number: int, plan_file: Path) -> None:
        for _ in range(RESTARTS + 1):
            process = self.processes[number]
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            end_followers(process)  # while its id is still its own
            code = process.wait()
            if self.closing.is_set():
                return
            log = self.logs / f"server-{number}.log"
            logger.warning("server %d ended with exit code %d (%s), and is started again", number, code, log)
            self._start_one(number, plan_file)
        logger.error("server %d was started again %d times, and is left", number, RESTARTS)

    def close(self) -> None:
        self.closing.set()
        for process in self.processes.values():
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
        for watching in self.threads_watching:
            watching.join(END_LIMIT_S)
        for process in self.processes.values():
            end_group(process)
