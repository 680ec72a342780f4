"""Starts the ranks of this machine and answers for their end.

Each rank leads a process group of its own, so that what it started ends with it; no other process is ever touched.
Rank 0 speaks on the terminal, every rank in `logs/rank-N.log` of the output folder.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from rlt.launching.lifetime import PREEMPTED, end_followers, end_group, end_of, stop_signals
from rlt.launching.machines import Link
from rlt.launching.servers import Servers

GRACE_S = 20.0  # for the others, once one rank has failed; collectives that lost a peer mostly end by themselves
COPY_LIMIT_S = 2.0  # for what a rank wrote last


@dataclass
class Rank:
    number: int
    process: subprocess.Popen
    log: Path
    copying: threading.Thread | None  # to the terminal


class Supervisor:
    """`supervise` as an object: its threads put each rank's end into a queue, in the order in which they ended."""

    def __init__(self, logs: Path, servers: Servers | None, link: Link | None):
        self.logs, self.link = logs, link
        self.companions = [each for each in (servers, link) if each is not None]
        self.ranks: list[Rank] = []
        self.ended: queue.SimpleQueue[tuple[Rank, int]] = queue.SimpleQueue()
        self.stops = 0

    def start(self, command: list[str], environments: list[dict[str, str]]) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        for environment in environments:
            number = int(environment["RANK"])
            log = self.logs / f"rank-{number}.log"
            shown = environment["LOCAL_RANK"] == "0"
            if log.is_file():  # why an earlier life of the run ended
                log.replace(self.logs / f"rank-{number}.before.log")
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=None if shown else file,
                    stderr=subprocess.PIPE if shown else file,
                    start_new_session=True,
                )
            copying = threading.Thread(target=_copy, args=(process.stderr, log), daemon=True) if shown else None
            rank = Rank(number, process, log, copying)
            self.ranks.append(rank)
            if copying:
                copying.start()
            threading.Thread(target=self._wait_for, args=(rank,), daemon=True).start()
            if self.stops:  # asked before this rank was there
                _signal(rank, signal.SIGTERM)

    def _wait_for(self, rank: Rank) -> None:
        os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOWAIT)
        end_followers(rank.process)  # while its id is still its own
        self.ended.put((rank, rank.process.wait()))

    def stop(self, number: int, frame) -> None:
        """A signal to this process: the ranks are asked to save and stop; the second time, they are ended."""
        self.stops += 1
        if self.stops > 1:
            self.end_all()
        else:
            for rank in self.ranks:
                _signal(rank, signal.SIGTERM)

    def end_all(self) -> None:
        for rank in self.ranks:
            end_group(rank.process)

    def wait(self) -> int:
        """The run's exit code, once no rank is left."""
        failed: tuple[Rank, int] | None = None
        left, give_up, codes = len(self.ranks), None, []
        while left:
            if self._lost() or (give_up is not None and time.monotonic() > give_up):
                self.end_all()
            try:
                rank, code = self.ended.get(timeout=0.5)
            except queue.Empty:
                continue
            left -= 1
            codes.append(code)
            if code not in (0, PREEMPTED) and failed is None:
                failed = (rank, code)
                give_up = time.monotonic() + GRACE_S
                if self.link is not None and not self._lost():
                    self.link.announce(_how_it_ended(rank, code))
        if failed is not None and self.stops < 2:
            sys.stderr.write(last_words(*failed))
        for companion in self._lost():
            sys.stderr.write(companion.last_words())
        if failed is not None:
            return failed[1] if failed[1] > 0 else 128 - failed[1]
        return 1 if self._lost() else PREEMPTED if PREEMPTED in codes else 0

    def _lost(self) -> list[Servers | Link]:
        return [companion for companion in self.companions if companion.given_up.is_set()]


def supervise(
    command: list[str],
    environments: list[dict[str, str]],
    logs: Path,
    servers: Servers | None = None,
    link: Link | None = None,
) -> int:
    """Run a command once for each environment (with RANK and LOCAL_RANK) until all have ended.

    `stop_signals` to this process ask the ranks to save and stop. When one rank fails, the others have
    `GRACE_S` seconds; its last words are printed last.

    Args:
        servers: started before the ranks, and ended after them.
        link: to the other machines, whose failures end the ranks here.

    Returns:
        0, `PREEMPTED` when the ranks stopped and saved, or the exit code of the rank that failed first.
    """
    supervisor = Supervisor(logs, servers, link)
    numbers = stop_signals()
    before = [signal.signal(number, supervisor.stop) for number in numbers]
    code = 1
    try:
        for companion in supervisor.companions:
            companion.start()
        supervisor.start(command, environments)
        code = supervisor.wait()
        return code
    finally:
        supervisor.end_all()
        for companion in supervisor.companions:
            companion.close(code in (0, PREEMPTED))
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def last_words(rank: Rank, code: int) -> str:
    """What the log of a failed rank ends with, and how it ended."""
    if rank.copying is not None:
        rank.copying.join(COPY_LIMIT_S)
    return f"\n{_how_it_ended(rank, code)} (all of it in {rank.log}):\n{end_of(rank.log)}\n"


def _how_it_ended(rank: Rank, code: int) -> str:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"rank {rank.number} ended first, with {how}"


def _copy(source, log: Path) -> None:
    """What a rank says, to the terminal (while there is one) and to its log."""
    with log.open("ab", buffering=0) as file:
        while chunk := os.read(source.fileno(), 65536):
            file.write(chunk)
            with contextlib.suppress(OSError):
                os.write(2, chunk)


def _signal(rank: Rank, number: int) -> None:
    if rank.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.process.pid, number)
