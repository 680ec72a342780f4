"""Generation servers of a run: started on devices of their own, started again when they die, ended with the run."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from rlt.launching.connection import LONGEST_SOCKET, UNIX, open_client
from rlt.launching.environment import listen
from rlt.launching.lifetime import end_followers, end_group, end_of, has_ended, is_stopped
from rlt.launching.watchdog import Watchdog
from rlt.places import KEY_VARIABLE

LOOPBACK = "127.0.0.1"
HOST_VARIABLE, PORT_VARIABLE = "SERVER_HOST", "SERVER_PORT"  # where servers listen, when not on the loopback address
RESTARTS, HOUR_S = 3, 3600  # of a server, in an hour
END_LIMIT_S = 20
WATCH_S, PROBE_LIMIT_S, HUNG_S = 2.0, 5.0, 30

logger = logging.getLogger("rlt")


@dataclass
class Servers:
    """One server for each entry of `devices` (the value of CUDA_VISIBLE_DEVICES there; empty: the CPU).

    Args:
        threads: of each, on a CPU.
        plan_file: what `rlt.generation.served.vllm_server` reads.
        host: the address at which they listen.
        first_port: of the first, the others' follow; 0: any that is free.
        sockets: a folder of this user's alone, where they listen instead at socket files.
        key: what they ask for.
        watchdog: ends them where this process is killed.
    """

    devices: list[str]
    threads: int
    logs: Path
    plan_file: Path
    host: str = LOOPBACK
    first_port: int = 0
    sockets: Path | None = None
    key: str = field(default_factory=lambda: os.environ.get(KEY_VARIABLE) or secrets.token_hex(16))
    watchdog: Watchdog | None = None

    def __post_init__(self):
        self.held: dict[int, socket.socket] = {}  # where servers listen, when not at files
        self.urls = [self._url(number) for number in range(len(self.devices))]
        self.closing, self.given_up = threading.Event(), threading.Event()
        self.processes: dict[int, subprocess.Popen] = {}
        self.ready: set[int] = set()  # ids of processes that have answered
        self.watching: list[threading.Thread] = []
        self.lock = threading.Lock()  # no server starts once they are being closed
        self.failed: int | None = None

    def _url(self, number: int) -> str:
        """A socket file in a folder of one's own, or a port that this process holds: others take neither while a server
        starts."""
        file = self.sockets and self.sockets / f"server-{number}.sock"
        if file and len(os.fsencode(file)) <= LONGEST_SOCKET:  # a scheduler's TMPDIR may be longer
            return f"{UNIX}{file}"
        self.held[number] = listen(self.first_port and self.first_port + number, self.host)
        return f"http://{self.host}:{self.held[number].getsockname()[1]}"

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
        held = [self.held[number].fileno()] if number in self.held else []
        place = [self.urls[number], str(os.getpid()), *map(str, held)]
        with self.lock, self._log(number).open("ab") as log:
            if self.closing.is_set():
                return
            self.processes[number] = subprocess.Popen(
                [sys.executable, "-m", "rlt.generation.served.vllm_server", str(self.plan_file), *place],
                env={
                    **os.environ,
                    KEY_VARIABLE: self.key,
                    "TMPDIR": str(self.plan_file.parent),  # vLLM leaves files there when it is killed
                    "CUDA_VISIBLE_DEVICES": self.devices[number],
                    "OMP_NUM_THREADS": str(self.threads),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=held,
                start_new_session=True,
            )
            if self.watchdog is not None:
                self.watchdog.watch(self.processes[number].pid)

    def _keep_alive(self, number: int) -> None:
        ends: deque[float] = deque()  # of the last hour
        while True:
            process = self.processes[number]
            why = self._until_it_ends(number, process)
            end_followers(process)  # while its id is still its own
            code = process.wait()
            if self.watchdog is not None:
                self.watchdog.forget(process.pid)
            if self.closing.is_set():
                return
            ends.append(time.monotonic())
            while ends[0] < time.monotonic() - HOUR_S:
                ends.popleft()
            if len(ends) > RESTARTS:
                break
            why = why or f"ended with code {code}"
            logger.warning("server %d %s (%s), and is started again", number, why, self._log(number))
            time.sleep(len(ends) - 1)
            self._start_one(number)
        self.failed = number
        self.given_up.set()

    def _until_it_ends(self, number: int, process: subprocess.Popen) -> str:
        """Wait for its end, or end it once it hangs; why, in the latter case.

        A server hangs that was ready and does not answer, or part of which is stopped, for `HUNG_S`.
        """
        was_ready, well = False, time.monotonic()
        while not has_ended(process.pid):
            time.sleep(WATCH_S)
            was_ready |= (does_answer := answers(self.urls[number]))
            if was_ready:
                self.ready.add(process.pid)
            if not was_ready or (does_answer and not is_stopped(process.pid)):
                well = time.monotonic()
            elif time.monotonic() - well > HUNG_S:
                end_group(process)
                return f"hung for {HUNG_S} s"
        return ""

    def last_words(self) -> str:
        assert self.failed is not None  # one has given up
        log = self._log(self.failed)
        return f"\nserver {self.failed} ended {RESTARTS + 1} times in an hour (all of it in {log}):\n{end_of(log)}\n"

    def close(self) -> None:
        with self.lock:
            self.closing.set()
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                if process.returncode is None:
                    # One that still loads has nothing to finish, and would hear nothing for as long as that takes.
                    os.kill(process.pid, signal.SIGTERM if process.pid in self.ready else signal.SIGKILL)
        give_up = time.monotonic() + END_LIMIT_S
        for thread in self.watching:
            thread.join(max(0.0, give_up - time.monotonic()))
        for process in self.processes.values():
            end_group(process)
            process.wait(END_LIMIT_S)
        for held in self.held.values():
            held.close()


def answers(url: str) -> bool:
    """Whether a server says that it is well, in time."""
    from httpx import HTTPError

    try:
        with open_client(url, PROBE_LIMIT_S) as client:
            return client.get("/health").is_success
    except HTTPError:
        return False
