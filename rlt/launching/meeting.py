"""Several machines of one run: their launchers meet at a store on the first of them before any rank starts, compare
what they were started with, and say what stands in the way; PyTorch's rendezvous numbers them from then on.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import DistError, HashStore, PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from rlt.durable import write_whole
from rlt.errors import Refused
from rlt.launching.environment import Machines, route_to
from rlt.runs.folder import MEETING

SILENCE_S = 30  # after which a machine counts as gone
LAST_CALL_S = 10  # for machines beyond the least number of them
HEAR_S = 2.0  # how long the store outlives bad news, so that the others hear them
SEEN_LIMIT_S = 10.0  # for a network file system to show what another machine wrote
POLL_S = 0.2
VERDICT, READY = "verdict", "ready"


@cache  # one store for a run and its warm-up
def open_store(machines: Machines, limit_s: float) -> TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT, which node 0 holds.

    Raises:
        Refused: the port cannot be had, or nobody answers there.
    """
    place, holds = (machines.master_addr, machines.master_port), machines.node == 0
    try:
        store = TCPStore(*place, is_master=holds, timeout=timedelta(seconds=limit_s), wait_for_workers=False)
    except DistError:
        if holds:
            raise Refused(f"MASTER_PORT={place[1]} cannot be had on this machine: name another") from None
        name = f"MASTER_ADDR={place[0]}, MASTER_PORT={place[1]}"
        raise Refused(f"{name} did not answer within {limit_s:.0f} s") from None
    store.set_timeout(timedelta(seconds=SILENCE_S))
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == place[1]:
            _limit_silence(connection.fd)
    return store


def _limit_silence(connection: int) -> None:
    """A request to a store on a machine that is gone fails after `SILENCE_S`; the store would wait without end."""
    with socket.socket(fileno=os.dup(connection)) as end:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 3)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 3)


class Meeting:
    """This machine's launcher among the others: `compare`, then `start`.

    Args:
        name: of the run, another for its warm-up.
        limit_s: for the others to come.
    """

    def __init__(self, machines: Machines, name: str, limit_s: float):
        self.machines, self.name, self.limit_s = machines, name, limit_s
        self.whole = open_store(machines, limit_s)
        self.store = PrefixStore(f"rlt/{name}", self.whole)
        self.node = self._number() if machines.node is None else machines.node

    def _number(self) -> int:
        """By the order in which machines come; one that comes back gets the number of any."""
        return (self.store.add("numbered", 1) - 1) % (self.machines.most - 1) + 1

    def compare(self, started_with: dict[str, Any], problem: str = "") -> None:
        """Whether all were started with the same, and nothing stands in the way of any.

        Args:
            problem: what stands in the way of this machine.

        Raises:
            Refused: somebody is missing, came twice, has a problem, or was started with something else.
        """
        node = self.node
        if self.store.add(f"came/{node}", 1) > 1 and not self.store.check([READY]):
            raise Refused(f"NODE_RANK={node} came twice: another on each machine")
        self.store.set(str(node), json.dumps([started_with, problem]))
        if node == 0:
            self.store.set(VERDICT, self._objection(0) or self._judge())
        self._wait_until(lambda: self.store.check([VERDICT]))
        # A machine that joins the others later comes after their verdict.
        if word := self.store.get(VERDICT).decode() or self._objection(node):
            self.let_hear()
            raise Refused(word)

    def _judge(self) -> str:
        """The first objection to another machine, or who is missing, or nothing."""
        begun, least, most = time.monotonic(), self.machines.least, self.machines.most
        while True:
            came = [node for node in range(1, most) if self.store.check([str(node)])]
            if objection := next(filter(None, map(self._objection, came)), ""):
                return objection
            waited = time.monotonic() - begun
            if len(came) + 1 >= (least if waited > LAST_CALL_S else most):
                return ""
            if waited > self.limit_s:
                names = ", ".join(f"NODE_RANK={node}" for node in range(1, most) if node not in came)
                return f"{names} did not come within {self.limit_s:.0f} s"
            time.sleep(POLL_S)

    def _objection(self, node: int) -> str:
        (theirs, _), (ours, problem) = (json.loads(self.store.get(str(number))) for number in (0, node))
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                return (
                    f"{key}={theirs.get(key)} with NODE_RANK=0 and {ours.get(key)} with NODE_RANK={node}: "
                    "start every machine with the same command"
                )
        return problem and f"machine {node}: {problem}"

    def start(self, folder: Path) -> None:
        """Wait until node 0 has prepared the run, in a folder that is this machine's too: it holds what node 0 drew.

        Raises:
            Refused: it has ended instead, or its folder is another.
        """
        if self.node == 0:
            self.store.set(READY, draw(folder))
        self._wait_until(lambda: self.store.check([READY]))
        check_same(folder, self.store.get(READY).decode())

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        try:
            while not condition():
                time.sleep(POLL_S)
        except DistError:
            raise Refused("NODE_RANK=0 ended before the run began") from None

    def let_hear(self) -> None:
        """Before an end that was not the good one."""
        if self.node == 0:
            time.sleep(HEAR_S)


def draw(folder: Path) -> str:
    """What stands in a run's folder from now on, and cannot stand in another."""
    drawn = secrets.token_hex(16)
    write_whole(folder / MEETING, drawn)
    return drawn


def check_same(folder: Path, drawn: str) -> None:
    """That a folder is the one where the first machine drew this.

    Raises:
        Refused: it is another.
    """
    give_up = time.monotonic() + SEEN_LIMIT_S
    while not _holds(folder / MEETING, drawn):
        if time.monotonic() > give_up:
            raise Refused(f"output_dir={folder} is not the folder of NODE_RANK=0: choose one that all machines share")
        time.sleep(POLL_S)


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == text
    except OSError:  # not there, or not yet
        return False


def rendezvous(meeting: Meeting | None) -> RendezvousHandler:
    """PyTorch's rendezvous of this machine alone, or of those of a meeting."""
    machines = meeting.machines if meeting else Machines()
    name, limit_s = (meeting.name, meeting.limit_s) if meeting else ("run", SILENCE_S)
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint="",
        run_id=name,
        min_nodes=machines.least,
        max_nodes=machines.most,
        local_addr=route_to(machines.master_addr)[0] if meeting else machines.master_addr,
        join_timeout=int(limit_s),
        last_call_timeout=LAST_CALL_S,
        keep_alive_interval=SILENCE_S // 3,
        keep_alive_max_attempt=3,
    )
    store = meeting.whole if meeting else HashStore()
    return create_handler(store, C10dRendezvousBackend(store, name), parameters)
