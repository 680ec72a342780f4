"""Operations that are asked for now and done in order: what comes back at once, and who works on them.

future = worker.submit(work, batch)
future.result(timeout=60)                 # the value, or what the work raised
await future                              # the same in a coroutine; so is `await future.result()`
"""

import asyncio
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from rlt.errors import Refused

Value = TypeVar("Value")


class RanksLost(RuntimeError):
    """A process of several that train together has ended, and with it all of them."""


class TrainFuture(Generic[Value]):
    """The value of an operation that may not have begun."""

    def __init__(self, inner: Future):
        self._inner = inner

    def done(self) -> bool:
        """Whether it has ended: with a value, an exception, or cancelled."""
        return self._inner.done()

    def cancel(self) -> bool:
        """Give it up. False where it has begun, and so goes on."""
        return self._inner.cancel()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the value. Without a timeout, where an event loop runs: what gives it when awaited.

        Args:
            timeout: seconds; with it, the value itself everywhere.

        Raises:
            TimeoutError: it has not ended in time; it goes on.
            concurrent.futures.CancelledError: it was cancelled.
            Exception: what the operation raised.
        """
        if timeout is None and _is_in_event_loop():
            return self
        try:
            return self._inner.result(timeout)
        except TimeoutError as error:
            if self._inner.done():  # the operation's own
                raise
            raise TimeoutError(f"the operation has not ended within {timeout} s; it goes on") from error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end, and say what the operation raised; None: nothing."""
        return self._inner.exception(timeout)

    def __await__(self) -> Generator[Any, None, Value]:
        """Where the coroutine is cancelled, so is an operation that has not begun."""
        return asyncio.wrap_future(self._inner).__await__()


class Worker:
    """One thread that does what it is given, in order."""

    def __init__(self, name: str):
        self._name = name
        self._thread: list[int] = []  # its identity; not `self`, which the thread would keep alive, and itself with it
        self._threads = ThreadPoolExecutor(1, name, initializer=_remember, initargs=(self._thread,))

    def submit(self, work: Callable[..., Value], *args: Any, **options: Any) -> TrainFuture[Value]:
        """Have it done after all that was given before.

        Raises:
            Refused: the work at hand asks, which would wait for itself; or the worker is closed.
        """
        if threading.get_ident() in self._thread:
            raise Refused(f"an operation of {self._name} asks for another one, which would wait for it: ask outside")
        try:
            return TrainFuture(self._threads.submit(work, *args, **options))
        except RuntimeError as error:
            raise Refused(f"{self._name} is closed: {error}") from error

    def close(self) -> None:
        """Finish what has begun; what has not never does."""
        self._threads.shutdown(wait=True, cancel_futures=True)


def _remember(identities: list[int]) -> None:
    identities.append(threading.get_ident())


def _is_in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
