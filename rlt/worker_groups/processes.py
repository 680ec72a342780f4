"""The ranks of a training service on this machine: started by PyTorch's elastic agent in a process of its own
(`python -m rlt.worker_groups.processes FOLDER SERVICE`), spoken to over a socket in a folder that only this user sees.

A rank that fails ends the others; all end with the service's process, however that ends.
"""

import json
import os
import selectors
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from backends.futures import RanksLost
from rlt.errors import Refused
from rlt.launching.lifetime import end_of, end_with
from rlt.launching.owned import SERVICE, owned_folder
from rlt.worker_groups.rank import SOCKET, SPEC

POLL_S = 1.0
ENDING_S = 50.0  # the agent ends a rank that is held for 30 s
CLOSING_S = 20.0
LOG = "launcher.log"


class Processes:
    """`start`, then `call` as often as needed, then `close`; all by one thread, which they end with.

    Args:
        procs: ranks.
        spec: of `rank.Worker`: backend, arguments.
        limit_s: for ranks to wait for each other, and for an operation.
    """

    def __init__(self, procs: int, spec: dict[str, Any], limit_s: float):
        self.procs, self.spec, self.limit_s = procs, spec, limit_s
        self.ends: list[socket.socket] = []

    def start(self) -> list[bytes]:
        """What each rank says of its beginning."""
        self._holder = owned_folder(SERVICE)
        self.folder = Path(self._holder.name)
        (self.folder / SPEC).write_text(
            json.dumps({**self.spec, "procs": self.procs, "limit_s": self.limit_s}), encoding="utf-8"
        )
        command = [sys.executable, "-m", __name__, str(self.folder), str(os.getpid())]
        with socket.socket(socket.AF_UNIX) as door, (self.folder / LOG).open("wb") as log:
            door.bind(str(self.folder / SOCKET))
            door.listen(self.procs)
            door.settimeout(POLL_S)
            self.launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self.ends = self._welcome(door, time.monotonic() + self.limit_s)
        return self._replies()

    def _welcome(self, door: socket.socket, deadline: float) -> list[socket.socket]:
        """The ranks' ends, in their order."""
        from rlt.worker_groups.messages import receive, unpack

        came: dict[int, socket.socket] = {}
        while len(came) < self.procs:
            with suppress(TimeoutError, EOFError):
                end = door.accept()[0]
                end.settimeout(self.limit_s)
                came[unpack(receive(end))] = end
            if self.launcher.poll() is not None or time.monotonic() > deadline:
                self.ends = [*came.values()]
                raise self._lost()
        return [came[rank] for rank in sorted(came)]

    def call(self, message: bytes) -> list[bytes]:
        """What each rank answers.

        Raises:
            RanksLost: some rank is gone, and so are all.
        """
        from rlt.worker_groups.messages import send

        if not self.ends:
            raise RanksLost("the ranks of this service have ended")
        with suppress(BrokenPipeError, ConnectionResetError):  # its end is seen below
            for end in self.ends:
                send(end, message)
        return self._replies()

    def ask_sampler(self, message: bytes) -> bytes:
        """
        Raises:
            Refused: there is none.
        """
        raise Refused("this service has no sampler: one of backend='ray' with resources of 'sample' has")

    def _replies(self) -> list[bytes]:
        from rlt.worker_groups.messages import receive

        found: dict[int, bytes] = {}
        deadline = time.monotonic() + self.limit_s
        with selectors.DefaultSelector() as waiting:
            for rank, end in enumerate(self.ends):
                waiting.register(end, selectors.EVENT_READ, rank)
            while len(found) < self.procs:
                for key, _ in waiting.select(POLL_S):
                    try:
                        found[key.data] = receive(self.ends[key.data])
                    except (EOFError, ConnectionResetError):
                        raise self._lost() from None
                    waiting.unregister(key.fileobj)
                if time.monotonic() > deadline:
                    raise self._lost(f"no answer within {self.limit_s:.0f} s")
        return [found[rank] for rank in sorted(found)]

    def _lost(self, why: str = "") -> RanksLost:
        """End what is left, and say what the ranks said last."""
        if not why:
            with suppress(subprocess.TimeoutExpired):
                self.launcher.wait(ENDING_S)
        words = why or end_of(self.folder / LOG) or f"they did not come within {self.limit_s:.0f} s"
        self._end()
        return RanksLost(f"a rank of this service was lost: {words}")

    def _end(self) -> None:
        for end in self.ends:
            end.close()
        self.ends = []
        self.launcher.kill()  # its ranks end with it
        self.launcher.wait()
        self._holder.cleanup()

    def close(self) -> None:
        if not self.ends:
            return
        with suppress(OSError):
            for end in self.ends:
                end.shutdown(socket.SHUT_WR)
        with suppress(subprocess.TimeoutExpired):
            self.launcher.wait(CLOSING_S)
        self._end()


def main() -> None:
    """Of the launcher: the agent, which needs a process's main thread."""
    folder, service = Path(sys.argv[1]), int(sys.argv[2])
    end_with(service)
    from rlt.launching.agent import run_ranks
    from rlt.launching.environment import Machines, rank_environment
    from rlt.launching.watchdog import Watchdog

    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    environment = rank_environment("ddp", spec["procs"], spec["on_cpu"], Machines())
    environment["TMPDIR"] = str(folder)  # where libraries leave files when a rank is killed
    command = [sys.executable, "-m", "rlt.worker_groups.rank", str(folder), str(os.getpid())]
    with Watchdog() as watchdog:
        watchdog.watch(folder)
        code = run_ranks(command, spec["procs"], folder / "logs", environment, folder, watchdog=watchdog)
    sys.exit(code)


if __name__ == "__main__":
    main()
