"""Several machines of one run: their launchers meet before any rank starts, and each learns when another is gone.

Node 0 listens at MASTER_PORT; the others say what they were started with and are told where ranks meet. From then on
each side speaks every few seconds: silence, a closed connection or a failure ends the ranks of the other side.
"""

import json
import logging
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rlt.errors import Refused

DEFAULT_PORT = 29500
BEAT_S = 5.0
SILENCE_S = 30.0  # after which a machine counts as gone
RETRY_S = 0.5
ALIVE, DONE = "alive", "done"

logger = logging.getLogger("rlt")


@dataclass(frozen=True)
class Machines:
    """This machine among those of the run; port 0: any that is free."""

    nodes: int
    node: int
    master_addr: str
    master_port: int


def read_machines(environment: dict[str, str]) -> Machines:
    """The machines of a run, from the environment.

    Raises:
        Refused: NNODES, NODE_RANK, MASTER_ADDR or MASTER_PORT do not go together.
    """

    def number(name: str, default: int) -> int:
        text = environment.get(name, str(default))
        if not text.isdigit():
            raise Refused(f"{name}={text} is not a number")
        return int(text)

    nodes, node, port = number("NNODES", 1), number("NODE_RANK", 0), number("MASTER_PORT", 0)
    if nodes < 1:
        raise Refused(f"NNODES={nodes} must be above 0")
    if port >= 2**16:
        raise Refused(f"MASTER_PORT={port} must be below {2**16}")
    if not 0 <= node < nodes:
        raise Refused(f"NODE_RANK={node} with NNODES={nodes}: it must be in 0 to {nodes - 1}")
    if nodes == 1:
        return Machines(1, 0, "127.0.0.1", port)
    if "MASTER_ADDR" not in environment:
        raise Refused(f"NNODES={nodes} needs MASTER_ADDR, the address of the machine with NODE_RANK=0")
    if "NODE_RANK" not in environment:
        raise Refused(f"NNODES={nodes} needs NODE_RANK, 0 to {nodes - 1}, another on each machine")
    return Machines(nodes, node, environment["MASTER_ADDR"], port or DEFAULT_PORT)


class Line:
    """Lines of text over a connection."""

    def __init__(self, connection: socket.socket, limit_s: float):
        self.connection = connection
        self.connection.settimeout(limit_s)
        self.reader = connection.makefile("r", encoding="utf-8")

    def say(self, text: str) -> None:
        self.connection.sendall(f"{text}\n".encode())

    def hear(self) -> str:
        """The next line; empty when the other side is gone, or silent for too long."""
        try:
            return self.reader.readline().rstrip("\n")
        except (OSError, ValueError):
            return ""

    def close(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Link:
    """The connection of this machine's launcher to the others: `meet`, `agree`, `start`, `close`.

    Args:
        limit_s: for the others to come.
    """

    def __init__(self, machines: Machines, limit_s: float):
        self.machines, self.limit_s = machines, limit_s
        self.lines: dict[int, Line] = {}
        self.given_up, self.closing = threading.Event(), threading.Event()
        self.reason = ""

    def meet(self, started_with: dict[str, Any]) -> None:
        """Node 0 waits for all others and compares what they were started with; the others introduce themselves.

        Raises:
            Refused: somebody is missing, or was started with something else.
        """
        if self.machines.node == 0:
            self._wait_for_others(started_with)
            self._say_to_all(ALIVE)
            return
        line = Line(self._reach_first(), self.limit_s)
        line.say(json.dumps({"node": self.machines.node, "started_with": started_with}))
        self.lines[0] = line
        if (said := self._hear_first()) != ALIVE:
            raise Refused(said)

    def _hear_first(self) -> str:
        return self.lines[0].hear() or "NODE_RANK=0 ended before the run began"

    def _wait_for_others(self, started_with: dict[str, Any]) -> None:
        give_up = time.monotonic() + self.limit_s
        awaited = set(range(1, self.machines.nodes))
        with _listen(self.machines.master_port) as listener:
            while awaited:
                listener.settimeout(max(0.01, give_up - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    names = ", ".join(f"NODE_RANK={node}" for node in sorted(awaited))
                    self._refuse(f"{names} did not come within {self.limit_s:.0f} s")
                self._take_in(Line(connection, SILENCE_S), started_with, awaited)

    def _take_in(self, line: Line, started_with: dict[str, Any], awaited: set[int]) -> None:
        try:
            introduced = json.loads(line.hear())
            node, theirs = introduced["node"], introduced["started_with"]
            taken = node not in awaited
        except (ValueError, KeyError, TypeError):
            line.close()  # somebody else's connection
            return
        self.lines[-1 if taken else node] = line
        if taken:
            self._refuse(f"NODE_RANK={node} came twice, or is none of NNODES={self.machines.nodes}")
        awaited.discard(node)
        for key in sorted({*started_with, *theirs}):
            if started_with.get(key) != theirs.get(key):
                self._refuse(
                    f"{key}={started_with.get(key)} with NODE_RANK=0 and {theirs.get(key)} with NODE_RANK={node}: "
                    "start every machine with the same command"
                )

    def _refuse(self, reason: str) -> None:
        for line in self.lines.values():
            with suppress(OSError):
                line.say(reason)
            line.close()
        raise Refused(reason)

    def _reach_first(self) -> socket.socket:
        give_up = time.monotonic() + self.limit_s
        place = self.machines.master_addr, self.machines.master_port
        while True:
            try:
                return socket.create_connection(place, timeout=SILENCE_S)
            except OSError as error:
                if time.monotonic() > give_up:
                    name = f"MASTER_ADDR={place[0]}, MASTER_PORT={place[1]}"
                    raise Refused(f"{name} did not answer within {self.limit_s:.0f} s: {error}") from None
            time.sleep(RETRY_S)

    def agree(self, port: int) -> int:
        """The port at which ranks meet: node 0 names it to the others, once nothing stands in the way.

        Raises:
            Refused: node 0 refused, or is gone.
        """
        if self.machines.node == 0:
            for line in self.lines.values():
                line.say(str(port))
            return port
        said = self._hear_first()
        if not said.isdigit():
            raise Refused(said)
        return int(said)

    def start(self) -> None:
        for node, line in self.lines.items():
            line.connection.settimeout(SILENCE_S)
            threading.Thread(target=self._listen_to, args=(node, line), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self.closing.wait(BEAT_S):
            self._say_to_all(ALIVE)

    def _listen_to(self, node: int, line: Line) -> None:
        while (said := line.hear()) == ALIVE:
            pass
        if said != DONE and not self.closing.is_set() and not self.given_up.is_set():
            self.reason = said or f"machine {node} was not heard of for {SILENCE_S:.0f} s, or ended without a word"
            self.given_up.set()
            self._say_to_all(self.reason)  # those that only node 0 knows

    def last_words(self) -> str:
        return f"\n{self.reason}\n"

    def announce(self, failure: str) -> None:
        """Tell the others at once that this machine's part has failed."""
        self._say_to_all(f"machine {self.machines.node}: {failure}")

    def close(self, well: bool) -> None:
        self.closing.set()
        if well:
            self._say_to_all(DONE)
        for line in self.lines.values():
            line.close()

    def _say_to_all(self, text: str) -> None:
        for line in self.lines.values():
            with suppress(OSError):
                line.say(text)


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise Refused(f"MASTER_PORT={port} cannot be had on this machine ({error.strerror}): name another") from None
