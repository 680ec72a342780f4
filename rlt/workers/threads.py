"""A process whose threads execute what is sent to it: many samples at once, which one engine draws in one batch.

As `ProcessPoolExecutor` with one worker, but for the number of calls that run at a time.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from rlt.generation.ended import EngineEnded

ENGINE_ENDED = 3  # exit code


class ProcessOfThreads(Executor):
    """The process starts with the first call, and ends with this one.

    Args:
        initializer: is called first; functions and their arguments can be pickled.
        threads: calls that run at a time; others wait for them.
    """

    def __init__(self, initializer: Callable[[], None], threads: int) -> None:
        self._initializer, self._threads = initializer, threads
        self._futures: dict[int, Future] = {}
        self._lock = threading.Lock()
        self._number, self._broken = 0, False
        self._process: SpawnProcess | None = None
        self._sender = ThreadPoolExecutor(1, "send")  # a pipe whose reader is busy holds up who writes to it

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        with self._lock:
            if self._broken:
                raise BrokenExecutor("the process has ended")
            if self._process is None:
                self._start()
            self._number += 1
            number, future = self._number, Future()
            self._futures[number] = future
        self._sender.submit(self._send, (number, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            self._broken = True
            process, self._process = self._process, None
        if cancel_futures:
            for future in list(self._futures.values()):
                future.cancel()
        if process is not None:
            self._sender.submit(self._send, None)  # it ends when what it executes is done
            if wait:
                process.join()
        self._sender.shutdown(wait=False)

    def _start(self) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._initializer, self._threads), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        threading.Thread(target=self._receive, args=(process,), daemon=True).start()

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # it has ended, which `_receive` finds out
            self._pipe.send(message)

    def _receive(self, process: SpawnProcess) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, result, error = self._pipe.recv()
                future = self._futures.pop(number)
                if not future.set_running_or_notify_cancel():
                    continue
                future.set_exception(error) if error is not None else future.set_result(result)
        with self._lock:
            self._broken = True
            left, self._futures = self._futures, {}
        for future in left.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(BrokenExecutor("the process has ended before its answer"))
        process.join()  # nothing is left of it


def _serve(pipe: Connection, initializer: Callable[[], None], threads: int) -> None:
    """The other side."""
    initializer()
    lock = threading.Lock()

    def answer(number: int, done: Future) -> None:
        error = done.exception()
        if isinstance(error, EngineEnded):
            os._exit(ENGINE_ENDED)  # nothing more can come of this process: another one is asked
        with lock:
            pipe.send((number, None if error else done.result(), error))

    with ThreadPoolExecutor(threads, "sample") as pool, suppress(EOFError):
        while (message := pipe.recv()) is not None:
            number, call = message
            pool.submit(call).add_done_callback(partial(answer, number))
