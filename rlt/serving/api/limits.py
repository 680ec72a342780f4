"""Bodies that are too large, too slow or packed are refused before anything reads them, as are too many at once."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from rlt.serving.errors import Busy

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
PLAIN = (b"", b"identity")
SMALL = 64 * 1024  # bytes of a body that is always read, as those of polls and heartbeats are
LINGER_S = 1.0  # for more of a body that is refused
PAUSE_S = 60.0  # of a client in the middle of its body


class TooLarge(ValueError):
    """413."""


class TooSlow(TimeoutError):
    """408."""


class BodyLimit:
    """
    Args:
        most: bytes of one body.
        most_in_all: bytes of all that are in memory; one is always read.
    """

    def __init__(self, app: Any, most: int, most_in_all: int) -> None:
        self.app, self.most, self.most_in_all = app, most, most_in_all
        self.held = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope.get("headers", ()))
        announced = int(length) if (length := headers.get(b"content-length", b"0")).isdigit() else 0
        if headers.get(b"content-encoding", b"") not in PLAIN:
            await _refuse(receive, send, 415, b'{"detail": "packed bodies are not read: leave Content-Encoding out"}')
        elif announced > self.most:
            await _refuse(receive, send, 413, b'{"detail": "the body has more than %d bytes"}' % self.most)
        elif self._full(announced):
            await _refuse(receive, send, 429, b'{"detail": "many large bodies are on their way: come again"}')
        else:
            body = _Body(self, receive, announced)
            try:
                await self.app(scope, body.receive, send)
            finally:
                self.held -= body.held

    def _full(self, more: int) -> bool:
        return more > SMALL and self.held > 0 and self.held + more > self.most_in_all


class _Body:
    """One body as it comes in."""

    def __init__(self, limit: BodyLimit, receive: Receive, announced: int) -> None:
        self.limit, self._receive = limit, receive
        self.read, self.more = 0, True
        self.held = 0
        self._hold(announced)

    def _hold(self, size: int) -> None:
        self.limit.held += size - self.held
        self.held = size

    async def receive(self) -> Message:
        try:
            message = await asyncio.wait_for(self._receive(), PAUSE_S if self.more else None)
        except TimeoutError:
            raise TooSlow(f"nothing more of the body came for {PAUSE_S:g} s") from None
        self.more = self.more and bool(message.get("more_body", False))
        self.read += len(message.get("body", b""))
        if self.read > self.limit.most:
            raise TooLarge(f"the body has more than {self.limit.most} bytes")
        if self.limit._full(self.read - self.held):
            raise Busy("many large bodies are on their way: come again")
        self._hold(max(self.held, self.read))
        return message


async def _read_what_is_small(receive: Receive) -> None:
    """A connection that is closed on unread bytes is reset, and its client never sees the answer."""
    read, more = 0, True
    with suppress(TimeoutError):
        while more and read <= SMALL:
            message = await asyncio.wait_for(receive(), LINGER_S)
            read, more = read + len(message.get("body", b"")), bool(message.get("more_body", False))


async def _refuse(receive: Receive, send: Send, status: int, body: bytes) -> None:
    await _read_what_is_small(receive)
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
