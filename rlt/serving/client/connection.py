"""One server, asked from a thread of its own, so that scripts and coroutines may both wait for it."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import httpx

from rlt.durable import written_whole
from rlt.errors import Refused
from rlt.serving.client.futures import RequestFailed, ServerFuture

R = TypeVar("R")
PROTOBUF = "application/x-protobuf"
FIRST_WAIT_S, LONGEST_WAIT_S, TRIES = 0.25, 10.0, 12  # about a minute and a half, enough for a server to come back
CONNECT_S, READ_S = 10.0, 60.0  # a poll is held for less
FILE_S = 120.0  # between two parts of a file
REPEATED = (408, 429, 500, 502, 503, 504)
GONE = 404


class Connection:
    def __init__(self, base_url: str, key: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="training-api", daemon=True)
        self._thread.start()
        limits = httpx.Limits(max_connections=None)
        timeout = httpx.Timeout(READ_S, connect=CONNECT_S)
        self.http = httpx.AsyncClient(
            base_url=f"{base_url.rstrip('/')}/api/v1/", headers={"X-API-Key": key}, limits=limits, timeout=timeout
        )

    def start(self, work: Coroutine[Any, Any, R]) -> "Future[R]":
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def ask(self, method: str, route: str, content: bytes | None = None, **headers: str) -> httpx.Response:
        """Repeated while the server is away or busy: the same request is executed once, whatever arrives twice.

        Raises:
            Refused: what the server says about a request that cannot work.
            ConnectionError: it stayed away.
        """
        tries = 0

        async def once() -> httpx.Response:
            nonlocal tries
            tries += 1
            return await self.http.request(method, route, content=content, headers=headers)

        answer = await self._repeated(route, once)
        if method == "DELETE" and tries > 1 and answer.status_code == GONE:
            return answer  # removed by a request whose answer was lost
        return _checked(answer)

    async def fetch(self, url: str, path: Path) -> None:
        """A file, from its first byte again where the server went away. It has its name once it is whole.

        Raises:
            Refused, ConnectionError: as in `ask`.
        """

        async def once() -> httpx.Response:
            async with self.http.stream("GET", url, timeout=FILE_S) as answer:
                if not answer.is_success:
                    await answer.aread()
                    return answer
                with written_whole(path) as aside, aside.open("wb") as file:
                    async for part in answer.aiter_bytes():
                        file.write(part)
            return answer

        _checked(await self._repeated(url, once))

    async def _repeated(self, route: str, once: Callable[[], Awaitable[httpx.Response]]) -> httpx.Response:
        wait, said = FIRST_WAIT_S, ""
        for _ in range(TRIES):
            try:
                answer = await once()
            except httpx.TransportError as error:
                said = f"{type(error).__name__} {error}"
            else:
                if answer.status_code not in REPEATED:
                    return answer
                said = answer.text
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)
        raise ConnectionError(f"{self.http.base_url.join(route)} gave no answer: {said}")

    async def post(self, route: str, form: dict[str, Any]) -> Any:
        return (await self.ask("POST", route, json.dumps(form).encode())).json()

    async def post_nothing(self, route: str, form: dict[str, Any]) -> None:
        await self.ask("POST", route, json.dumps(form).encode())

    async def wait_for(self, request_id: str) -> httpx.Response:
        """The answer to a request, polled for until it is there."""
        form = json.dumps({"request_id": request_id}).encode()
        while True:
            answer = await self.ask("POST", "retrieve_future", form, accept=f"{PROTOBUF}, application/json")
            if answer.headers.get("content-type") == PROTOBUF:
                return answer
            said = answer.json()
            if "category" in said and "error" in said:
                raise RequestFailed(said["error"], said["category"])
            if said.get("type") != "try_again":
                return answer

    def request(
        self, submit: Callable[[], Coroutine[Any, Any, dict[str, Any]]], read: Callable[[httpx.Response], R]
    ) -> ServerFuture[R]:
        """Send it, and read its answer when it comes.

        What is given up is sent all the same: later requests of its model wait for its number.
        """
        submitted = self.start(submit())

        async def work() -> R:
            sent = await asyncio.shield(asyncio.wrap_future(submitted))
            return read(await self.wait_for(sent["request_id"]))

        async def cancel() -> None:
            sent = await asyncio.wrap_future(submitted)
            await self.post_nothing("cancel_future", {"request_id": sent["request_id"]})

        return ServerFuture(self.start(work()), lambda: self.start(cancel()))

    def close(self) -> None:
        """What is on its way is given up."""
        if self.loop.is_closed():
            return
        self.start(self._end()).result(CONNECT_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(CONNECT_S)
        if not self._thread.is_alive():
            self.loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.http.aclose()


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_success:
        return answer
    is_json = answer.headers.get("content-type") == "application/json"
    said = answer.json().get("detail", answer.text) if is_json else answer.text
    raise Refused(f"{answer.request.url.path}: {said} ({answer.status_code})")
