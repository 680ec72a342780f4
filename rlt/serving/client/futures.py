"""Answers that a server will give: to wait for in a script (`result`), in a coroutine (`await`), or in groups."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED
from typing import Any, Generic, TypeVar

R = TypeVar("R")


class RequestFailed(RuntimeError):
    """The server's reason, and whose fault it was: `user` or `server`."""

    def __init__(self, error: str, category: str) -> None:
        super().__init__(error)
        self.category = category


class ServerFuture(Generic[R]):
    """An answer on its way. Giving up on it, by a time limit or by `cancel`, tells the server so."""

    def __init__(self, answer: "concurrent.futures.Future[R]", give_up: Callable[[], Any]) -> None:
        self.answer, self._give_up = answer, give_up
        self._given_up = False

    def result(self, timeout: float | None = None) -> R:
        """Raises: RequestFailed, TimeoutError, `rlt.errors.Refused`."""
        try:
            return self.answer.result(timeout)
        except concurrent.futures.TimeoutError as error:
            self.cancel()
            raise TimeoutError(f"no answer within {timeout} s: the request was cancelled") from error

    def __await__(self) -> Generator[Any, None, R]:
        return self._wait().__await__()

    async def _wait(self) -> R:
        """A coroutine that is cancelled while it waits (`asyncio.timeout`) gives up on the answer."""
        try:
            return await asyncio.wrap_future(self.answer)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def done(self) -> bool:
        return self.answer.done()

    def cancel(self) -> None:
        if self.answer.cancel() and not self._given_up:
            self._given_up = True
            self._give_up()


class FutureGroup:
    """Several answers at once."""

    def __init__(self, futures: Sequence[ServerFuture]) -> None:
        self.futures = list(futures)

    def wait_all(self, timeout: float | None = None) -> list[Any]:
        """All results, in the order of the futures; after the time limit all that is open is cancelled."""
        _, waiting = concurrent.futures.wait([each.answer for each in self.futures], timeout)
        if waiting:
            self.cancel_all()
            raise TimeoutError(f"{len(waiting)} of {len(self.futures)} had no answer within {timeout} s")
        return [each.result() for each in self.futures]

    def wait_any(self, timeout: float | None = None) -> ServerFuture:
        """The first that has an answer; of several the first in the order of the futures."""
        concurrent.futures.wait([each.answer for each in self.futures], timeout, return_when=FIRST_COMPLETED)
        for each in self.futures:
            if each.done():
                return each
        raise TimeoutError(f"none of {len(self.futures)} had an answer within {timeout} s")

    def cancel_all(self) -> None:
        for each in self.futures:
            each.cancel()
