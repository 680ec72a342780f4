"""Several machines of one run: their launchers meet at a store on the first of them before any rank starts, compare
what they were started with, and say what stands in the way; PyTorch's rendezvous numbers them from then on.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import psutil
from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from rlt.errors import Refused
from rlt.launching.environment import Machines, free_port, route_to

SILENCE_S = 30  # after which a machine counts as gone
ANSWER_LIMIT_S = 15  # of the store
LAST_CALL_S = 10  # for machines beyond the least number of them
PARTING_S = 10.0  # for the others to hear why a run ends
POLL_S = 0.2
STARTED, COMPARED, READY = "started", "compared", "ready"


@cache  # one store for a run and its warm-up
def open_store(machines: Machines, limit_s: float) -> TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT, which node 0 holds.

    Raises:
        Refused: the port cannot be had, or nobody answers there.
    """
    place = machines.master_addr, machines.master_port
    if machines.node == 0:
        try:
            free_port(place[1])
        except Refused:
            raise Refused(f"MASTER_PORT={place[1]} cannot be had on this machine: name another") from None
    else:
        _wait_for_answer(place, limit_s)
    store = TCPStore(*place, is_master=machines.node == 0, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=ANSWER_LIMIT_S))
    _limit_silence(machines.master_port)
    return store


def _limit_silence(port: int) -> None:
    """A request to a store on a machine that is gone fails after `SILENCE_S`; the store would wait without end."""
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == port:
            with socket.socket(fileno=os.dup(connection.fd)) as end:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 3)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 3)


def _wait_for_answer(place: tuple[str, int], limit_s: float) -> None:
    give_up = time.monotonic() + limit_s
    while True:
        try:
            socket.create_connection(place, timeout=SILENCE_S).close()
            return
        except OSError as error:
            if time.monotonic() > give_up:
                name = f"MASTER_ADDR={place[0]}, MASTER_PORT={place[1]}"
                raise Refused(f"{name} did not answer within {limit_s:.0f} s: {error}") from None
        time.sleep(POLL_S)


class Meeting:
    """This machine's launcher among the others: `compare`, then `agree`, or `object`.

    Args:
        name: of the run, another for its warm-up.
        limit_s: for the others to come.
    """

    def __init__(self, machines: Machines, name: str, limit_s: float):
        self.machines, self.name, self.limit_s = machines, name, limit_s
        self.whole = open_store(machines, limit_s)
        self.store: Store = PrefixStore(f"rlt/{name}", self.whole)
        self.agreed = False

    def compare(self, started_with: dict[str, Any]) -> None:
        """Whether all were started with the same.

        Raises:
            Refused: somebody is missing, came twice, or was started with something else.
        """
        node = self.machines.node
        if self.store.add(f"came/{node}", 1) > 1 and not self.store.check([READY]):
            raise Refused(f"NODE_RANK={node} came twice: another on each machine")
        if node == 0:
            self.store.set(STARTED, json.dumps(started_with))
            return self._together(COMPARED, "")
        self._wait_until(lambda: self.store.check([STARTED]))
        theirs = json.loads(self.store.get(STARTED))
        changed = [key for key in sorted({*started_with, *theirs}) if started_with.get(key) != theirs.get(key)]
        return self._together(COMPARED, self._difference(changed[0], started_with, theirs) if changed else "")

    def _difference(self, key: str, ours: dict, theirs: dict) -> str:
        return (
            f"{key}={theirs.get(key)} with NODE_RANK=0 and {ours.get(key)} with NODE_RANK={self.machines.node}: "
            "start every machine with the same command"
        )

    def agree(self) -> None:
        """Wait until nothing stands in the way on any machine.

        Raises:
            Refused: something does, or somebody is missing.
        """
        self.agreed = True
        self._together(READY, "")

    def object(self, problem: str) -> None:
        """Tell the others that the run cannot start on this machine, unless all have agreed that it can."""
        if not self.agreed:
            try:
                self._together(READY, f"machine {self.machines.node}: {problem}")
            except Refused:
                return

    def _together(self, stage: str, problem: str) -> None:
        """All say whether something stands in their way; node 0 waits for them, and tells all the first of it."""
        node = self.machines.node
        if node == 0:
            word = problem or self._hear_others(stage)
            self.store.set(stage, word)
        else:
            if not (late := self.store.check([stage])):  # else the others have decided, and this machine joins them
                self.store.set(f"{stage}/{node}", problem)
            self._wait_until(lambda: self.store.check([stage]))
            word = self.store.get(stage).decode() or (problem if late else "")
        if word:
            self.part()
            raise Refused(word)

    def _hear_others(self, stage: str) -> str:
        """The first problem of another machine, or who is missing, or nothing."""
        begun, least, most = time.monotonic(), self.machines.least, self.machines.most
        while True:
            came = [node for node in range(1, most) if self.store.check([f"{stage}/{node}"])]
            for node in came:
                if problem := self.store.get(f"{stage}/{node}").decode():
                    return problem
            waited = time.monotonic() - begun
            if len(came) + 1 >= (least if waited > LAST_CALL_S else most):
                return ""
            if waited > self.limit_s:
                names = ", ".join(f"NODE_RANK={node}" for node in range(1, most) if node not in came)
                return f"{names} did not come within {self.limit_s:.0f} s"
            time.sleep(POLL_S)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        try:
            while not condition():
                time.sleep(POLL_S)
        except DistError:
            raise Refused("NODE_RANK=0 ended before the run began") from None

    def part(self) -> None:
        """Before a run's end that was not its good one: node 0, who holds the store, lets the others hear of it."""
        node = self.machines.node
        try:
            self.store.set(f"parted/{node}", "")
            give_up = time.monotonic() + PARTING_S
            others = [other for other in range(1, self.machines.most) if self.store.check([f"came/{other}"])]
            while node == 0 and time.monotonic() < give_up:
                if all(self.store.check([f"parted/{other}"]) for other in others):
                    return
                time.sleep(POLL_S)
        except DistError:  # whoever held the store is gone
            return

    def words_on(self, error: Exception) -> str:
        """What is to be said when the rendezvous or its store has failed."""
        if isinstance(error, DistError) or "C10d store" in str(error):
            return f"\nmachine 0 was not heard of for {SILENCE_S} s, or ended without a word\n"
        return f"\nthe machines did not come together again within {self.limit_s:.0f} s ({type(error).__name__})\n"


def rendezvous(store: Store, meeting: Meeting | None) -> RendezvousHandler:
    """PyTorch's rendezvous over a store, for this machine alone or for those of a meeting."""
    name, least, most, address, limit = "run", 1, 1, "127.0.0.1", SILENCE_S
    if meeting is not None:
        machines = meeting.machines
        name, least, most, limit = meeting.name, machines.least, machines.most, meeting.limit_s
        address, _ = route_to(machines.master_addr)
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint="",
        run_id=name,
        min_nodes=least,
        max_nodes=most,
        local_addr=address,
        join_timeout=int(limit),
        last_call_timeout=LAST_CALL_S,
        keep_alive_interval=SILENCE_S // 3,
        keep_alive_max_attempt=3,
    )
    return create_handler(store, C10dRendezvousBackend(store, name), parameters)
