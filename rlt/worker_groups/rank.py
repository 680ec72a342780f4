"""One rank of a training service: `python -m rlt.worker_groups.rank FOLDER LAUNCHER`, started by processes.py.

It takes operations from the socket in FOLDER, does each together with the other ranks, and answers; rank 0 with the
value. It ends with its launcher, and when the service closes the socket.
"""

import json
import os
import socket
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from backends.futures import TrainFuture
from backends.futures import Worker as Thread
from rlt.launching.lifetime import end_with, keep_last_words, last_words

SPEC, SOCKET = "spec.json", "socket"  # in the service's folder
CREATORS = {
    "fsdp": "create_fsdp_backend",
    "deepspeed": "create_deepspeed_backend",
    "pytorch": "create_parallel_backend",
}
OPERATIONS = ("forward", "forward_backward", "optim_step", "load_weights", "save_state", "load_state")


class Worker:
    """A rank's backend behind messages.

    Args:
        kind: a key of `CREATORS`.
        arguments: of that function.
    """

    def __init__(self, kind: str, arguments: dict[str, Any]):
        self._kind, self._arguments = kind, arguments
        self._thread = Thread("a rank of a service")
        self.backend: Any = None

    def begin(self) -> bytes:
        """Make the backend."""
        return self._answer(self._thread.submit(self._create))

    def _create(self) -> None:
        import backends

        self.backend = getattr(backends, CREATORS[self._kind])(**self._arguments)

    def answer(self, message: bytes) -> bytes:
        """Do an operation; the value of rank 0, of other ranks that it was done, or why it was not."""
        from rlt.worker_groups.messages import unpack

        operation, *arguments = unpack(message)
        if operation == "get_weights":
            keep = self.backend._writes()
            return self._answer(self.backend._worker.submit(self.backend._get_weights, keep))
        assert operation in OPERATIONS, operation
        return self._answer(getattr(self.backend, operation)(*arguments))

    def _answer(self, future: TrainFuture) -> bytes:
        from rlt.worker_groups.messages import pack

        error = future.exception()
        if error is not None:
            return pack({"error": type(error).__name__, "text": str(error)})
        is_first = self.backend is None or self.backend._writes()
        return pack({"value": future.result(0) if is_first else None})

    def close(self) -> None:
        if self.backend is not None:
            self.backend.close()
        self._thread.close()


def main() -> None:
    folder = Path(sys.argv[1])
    end_with(int(sys.argv[2]))
    sys.excepthook = partial(keep_last_words, last_words(folder, os.environ["RANK"]))
    from backends.roll_call import leave_group, open_store_on_loopback
    from rlt.worker_groups.messages import pack, receive, send

    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    store = open_store_on_loopback(spec["limit_s"])
    worker = Worker(spec["backend"], spec["arguments"])
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(str(folder / SOCKET))
        send(end, pack(int(os.environ["RANK"])))
        send(end, worker.begin())
        with suppress(EOFError):  # the service is closed
            while True:
                send(end, worker.answer(receive(end)))
    worker.close()
    leave_group()
    del store  # held until here


if __name__ == "__main__":
    main()
