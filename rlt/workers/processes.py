"""Workers in processes of their own: one trains, one samples, and polls are answered while both are busy.

Whatever ends such a process ends no more than it: `revive` starts another, with nothing in it. What a process leaves in
its scratch folder goes when another takes its place, and when the server starts again.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import psutil

from rlt.launching.lifetime import end_with
from rlt.workers.accelerators import VISIBLE, accelerators, most_free
from rlt.workers.tensor_files import PULLED
from rlt.workers.threads import ProcessOfThreads
from rlt.workers.worker import SAMPLING, UNLOADING, Worker, answer

PULLED_S = 3600.0
PID = "pid"
SAMPLES_AT_ONCE = 256  # requests: a sampler draws them in one batch
STOP_S = 10.0  # for the request that is executed; after that it is ended, and executed anew after a restart

worker: Worker | None = None  # of the process that this module was imported in, if it is one of these


def _begin(make_worker: Callable[[], Worker], parent: int, scratch: Path, device: str | None) -> None:
    global worker
    try:
        end_with(parent)
    except SystemExit:  # the server was killed while this process began: nobody is left to be told
        os._exit(1)
    tempfile.tempdir = str(scratch)
    (scratch / PID).write_text(str(os.getpid()), encoding="utf-8")
    if device is not None:
        os.environ[VISIBLE] = device
    worker = make_worker()


def _answer(kind: str, model_id: str, payload: bytes) -> bytes:
    assert worker is not None
    return answer(worker, kind, model_id, payload)


def _empty(scratch: Path) -> None:
    """All but what was read of other machines of late, as that may be gone on with."""
    scratch.mkdir(parents=True, exist_ok=True)
    for path in scratch.iterdir():
        if path.name != PULLED:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    for path in (scratch / PULLED).glob("*"):
        if path.stat().st_mtime < time.time() - PULLED_S:
            shutil.rmtree(path, ignore_errors=True)


class _Process:
    """One worker, and the next in its place; it may do several requests at once."""

    def __init__(self, make_worker: Callable[[], Worker], scratch: Path, at_once: int) -> None:
        self.make_worker, self.scratch, self.at_once = make_worker, scratch, at_once
        self.device: str | None = None
        self.used = False

    def renew(self, avoid: str | None) -> None:
        """On the device with the most free memory, and not the other worker's where there are several."""
        _empty(self.scratch)
        self.device = most_free(accelerators(), avoid)
        begin = partial(_begin, self.make_worker, os.getpid(), self.scratch, self.device)
        self._pool: Executor = (
            ProcessOfThreads(begin, self.at_once)
            if self.at_once > 1
            else ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=begin)
        )
        self.used = False

    def send(self, kind: str, model_id: str, payload: bytes) -> Future[bytes]:
        self.used = True
        try:
            return self._pool.submit(_answer, kind, model_id, payload)
        except BrokenExecutor as error:  # it died before: the same as while it works
            broken: Future[bytes] = Future()
            broken.set_exception(error)
            return broken

    def end(self, within_s: float) -> None:
        """What it executes may end within some seconds."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with suppress(FileNotFoundError, psutil.NoSuchProcess):
            process = psutil.Process(int((self.scratch / PID).read_text(encoding="utf-8")))
            end = time.monotonic() + within_s
            if process.ppid() != os.getpid():  # it ended, and its number is another's
                return
            while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
                time.sleep(0.05)
            process.kill()


def _done() -> Future[bytes]:
    done: Future[bytes] = Future()
    done.set_result(b"{}")
    return done


class ProcessExecutor:
    """`make_worker` is called in each of the two processes: a function of a module, with plain arguments.

    A process starts with the first request, and ends with the thread that sent it: the server's main thread.

    Args:
        scratch: a folder of this server's alone, for what the workers need for a while.
    """

    def __init__(self, make_worker: Callable[[], Worker], scratch: Path) -> None:
        self.scratch = scratch
        self._training = _Process(make_worker, scratch / "training", 1)
        self._sampling = _Process(make_worker, scratch / "sampling", SAMPLES_AT_ONCE)
        self._training.renew(None)
        self._sampling.renew(self._training.device)

    def submit(self, kind: str, model_id: str, payload: bytes) -> Future[bytes]:
        process = self._sampling if kind in SAMPLING else self._training
        if kind in UNLOADING and not process.used:
            return _done()
        if process is self._training:
            return process.send(kind, model_id, payload)
        sent = self._sampling.send(kind, model_id, payload)
        if sent.done() and isinstance(sent.exception(), BrokenExecutor):  # it holds nothing that could be lost
            self._sampling.end(within_s=0)
            self._sampling.renew(self._training.device)
            sent = self._sampling.send(kind, model_id, payload)
        return sent

    def revive(self) -> None:
        self._training.end(within_s=0)
        self._training.renew(self._sampling.device)

    def close(self) -> None:
        for process in (self._training, self._sampling):
            process.end(STOP_S)
        shutil.rmtree(self.scratch, ignore_errors=True)
