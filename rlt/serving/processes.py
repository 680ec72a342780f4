"""Workers in processes of their own: one trains, one samples, and polls are answered while both are busy.

Whatever ends such a process ends no more than it: `revive` starts another, with nothing in it.
"""

import os
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from rlt.launching.lifetime import end_with
from rlt.serving.threads import ProcessOfThreads
from rlt.serving.worker import SAMPLING, Worker, answer

SAMPLES_AT_ONCE = 256  # requests: a sampler draws them in one batch

worker: Worker | None = None  # of the process that this module was imported in, if it is one of these


def _begin(make_worker: Callable[[], Worker], parent: int) -> None:
    global worker
    end_with(parent)
    worker = make_worker()


def _answer(kind: str, model_id: str, payload: bytes) -> bytes:
    assert worker is not None
    return answer(worker, kind, model_id, payload)


def _pool(make_worker: Callable[[], Worker], at_once: int = 1) -> Executor:
    begin = partial(_begin, make_worker, os.getpid())
    if at_once > 1:
        return ProcessOfThreads(begin, at_once)
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=begin)


class ProcessExecutor:
    """`make_worker` is called in each of the two processes: a function of a module, with plain arguments.

    A process starts with the first request, and ends with the thread that sent it: the server's main thread.
    """

    def __init__(self, make_worker: Callable[[], Worker]) -> None:
        self.make_worker = make_worker
        self._training, self._sampling = _pool(make_worker), _pool(make_worker, SAMPLES_AT_ONCE)

    def submit(self, kind: str, model_id: str, payload: bytes) -> Future[bytes]:
        if kind not in SAMPLING:
            return self._send(self._training, kind, model_id, payload)
        sent = self._send(self._sampling, kind, model_id, payload)
        if sent.done() and isinstance(sent.exception(), BrokenExecutor):  # it holds nothing that could be lost
            self._sampling = _pool(self.make_worker, SAMPLES_AT_ONCE)
            sent = self._send(self._sampling, kind, model_id, payload)
        return sent

    def _send(self, pool: Executor, kind: str, model_id: str, payload: bytes) -> Future[bytes]:
        try:
            return pool.submit(_answer, kind, model_id, payload)
        except BrokenExecutor as error:  # it died before: the same as while it works
            broken: Future[bytes] = Future()
            broken.set_exception(error)
            return broken

    def revive(self) -> None:
        self._training.shutdown(wait=False)
        self._training = _pool(self.make_worker)

    def close(self) -> None:
        for pool in (self._training, self._sampling):
            pool.shutdown(cancel_futures=True)
