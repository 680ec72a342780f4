"""Rank 0's side of served generation: it keeps the weights that were sent last, and brings any server up to date.

The other ranks, on whatever machine, ask it to when a server fails them; a server on another machine fetches its chunks
from here. Every path asks for the servers' key.
"""

import os
import queue
import secrets
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from rlt.errors import Refused
from rlt.generation.served.client import HELD_CODE, UPDATE_LIMIT_S, Server, ServerError
from rlt.generation.served.weight_files import ChunkFiles, ChunkUpdate
from rlt.places import KEY_VARIABLE

LOOPBACK = "127.0.0.1"
REQUEST_LIMIT_S = 10.0


class WeightService:
    """Listens until it is closed.

    Args:
        servers: those that get the weights.
        folder: for the chunks' files; of this service alone.
        address: of this machine for the others; None where there are no others.
        start_limit_s: for a server to be ready.
    """

    def __init__(self, servers: list[Server], folder: Path, address: str | None, start_limit_s: float):
        self.servers, self.folder, self.start_limit_s = servers, folder, start_limit_s
        self.chunks, self.updates, self.version = ChunkFiles(folder), [], ""
        self.locks = [threading.Lock() for _ in servers]
        place = address or LOOPBACK
        if address and socket.gethostbyname(address).startswith("127."):  # a host's own name for itself, on Debian
            place = ""
        self.http = ThreadingHTTPServer((place, 0), partial(Handler, self))
        self.url = f"http://{address or LOOPBACK}:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def send(
        self, weights: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype, version: str, adapter_of: str = ""
    ) -> None:
        """Chunks go out while the next ones are packed; a server that fails meanwhile gets them all again.

        Raises:
            ServerError: a server does not take them the second time either.
        """
        lines = [queue.SimpleQueue() for _ in self.servers]
        self.updates, self.version = [], version
        with ThreadPoolExecutor(len(self.servers)) as pool:
            asked = [pool.submit(self._send_to, *pair) for pair in zip(self.servers, lines, strict=True)]
            try:
                for update in self.chunks.write(weights, dtype, adapter_of):
                    self.updates.append(update)
                    for line in lines:
                        line.put(update)
            finally:
                for line in lines:
                    line.put(None)
        for number, sent in enumerate(asked):
            try:
                sent.result()
            except ServerError:
                self.bring_up_to_date(number)

    def _send_to(self, server: Server, line: queue.SimpleQueue) -> None:
        server.take_weights((self._for(server, update) for update in iter(line.get, None)), self.version)

    def bring_up_to_date(self, number: int) -> None:
        """Wait for a server that failed or was started again, and give it the weights unless it has them."""
        server = self.servers[number]
        with self.locks[number]:
            server.wait_until_ready(self.start_limit_s)
            if server.version() != self.version:
                with suppress(ServerError):  # an update that was cut off is still under way there
                    server.control("/finish_weight_update", limit_s=UPDATE_LIMIT_S)
                server.take_weights((self._for(server, update) for update in self.updates), self.version)

    def _for(self, server: Server, update: ChunkUpdate) -> dict:
        if not server.is_here:
            update = replace(update, source=f"{self.url}/{Path(update.source).name}")
        return asdict(update)


class Handler(BaseHTTPRequestHandler):
    """`GET /NAME`: a chunk. `POST /N`: bring server N up to date."""

    timeout = REQUEST_LIMIT_S  # for each piece of a request or an answer: a silent stranger holds a thread no longer

    def __init__(self, service: WeightService, *args):
        self.service = service
        super().__init__(*args)

    def do_GET(self) -> None:
        service = self.service
        named = {Path(update.source).name: update for update in service.updates}
        update = named.get(self.path.strip("/"))
        if self._may():
            self._say(200, service.chunks.content(update)) if update else self._say(404, b"no such chunk")

    def do_POST(self) -> None:
        if not self._may():
            return
        try:
            self.service.bring_up_to_date(int(self.path.strip("/")))
            self._say(200, b"")
        except ServerError as error:
            self._say(502, str(error).encode())
        except Refused as error:
            self._say(HELD_CODE, f"cannot send weights: {error}".encode())

    def _may(self) -> bool:
        wanted = f"Bearer {os.environ.get(KEY_VARIABLE, '')}".encode()
        given = self.headers.get("Authorization", "").encode()
        if not secrets.compare_digest(given, wanted):
            self._say(401, b"unauthorized")
            return False
        return True

    def _say(self, code: int, content: bytes | memoryview) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format, *args) -> None:
        """The run's log is not for each request."""
