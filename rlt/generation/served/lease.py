"""One run at a time has a server: the first that sends weights, until it lets go or asks nothing for `LEASE_S`.

Two runs on one server would overwrite each other's weights. The server's side is part of its guard (guard.py).
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from rlt.errors import Refused
from rlt.generation.served.client import END_LIMIT_S, Server, ServerError

LEASE_S = 300.0
RENEW_S = 60.0  # an update may take longer than a lease, and asks a server nothing
READS = ("/v1/", "/tokenize", "/detokenize")  # what is posted there changes nothing for others


def changes(method: str, path: str) -> bool:
    """Whether a request is for the server's holder alone: weights, pauses and caches are all posted."""
    return method == "POST" and not path.startswith(READS)


class Lease:
    """Who holds a server, as the server knows it; lost with its process, and taken again by the next request."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic):
        self.now_s = now_s
        self.holder, self.asked_at = "", 0.0

    def refusal(self, holder: str, changing: bool) -> str | None:
        """Why a request is refused. The holder's renew the lease; who changes something on a free server takes it."""
        silent_s = self.now_s() - self.asked_at
        if silent_s > LEASE_S:
            self.holder = ""
        if changing and not self.holder:
            self.holder = holder
        if holder == self.holder:
            self.asked_at = self.now_s()
        elif changing:
            return (
                f"is held by another run ({self.holder}), which asked {silent_s:.0f} s ago: end that one, name other "
                f"servers, or wait until it has asked nothing for {LEASE_S:.0f} s"
            )
        return None

    def let_go(self, holder: str) -> None:
        if holder == self.holder:
            self.holder = ""


class Hold:
    """A run's hold on its servers, taken at once and renewed until it is closed; on rank 0 alone.

    Raises:
        Refused: another run holds one of them.
        ServerError: one does not answer.
    """

    def __init__(self, servers: list[Server]):
        self.servers, self.closed = servers, threading.Event()
        for server in servers:
            server.hold()
        threading.Thread(target=self._renew, daemon=True).start()

    def _renew(self) -> None:
        while not self.closed.wait(RENEW_S):
            for server in self.servers:
                with suppress(ServerError, Refused):  # which the next update says
                    server.hold(END_LIMIT_S)

    def close(self) -> None:
        self.closed.set()
        for server in self.servers:
            with suppress(ServerError, Refused):  # it has ended, or is another's by now
                server.let_go()
