"""Bodies that are too large or packed are refused before anything reads them."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
PLAIN = (b"", b"identity")


class TooLarge(ValueError):
    """413."""


class BodyLimit:
    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        announced = headers.get(b"content-length", b"0")
        if scope["type"] == "http" and headers.get(b"content-encoding", b"") not in PLAIN:
            await _refuse(send, 415, b'{"detail": "packed bodies are not read: leave Content-Encoding out"}')
        elif scope["type"] == "http" and announced.isdigit() and int(announced) > self.most:
            await _refuse(send, 413, b'{"detail": "the body has more than %d bytes"}' % self.most)
        else:
            await self.app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise TooLarge(f"the body has more than {self.most} bytes")
            return message

        return counted


async def _refuse(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
