"""A process that does several things at once, and what becomes of them when it ends."""

import os
import signal
import threading
import time
from concurrent.futures import BrokenExecutor
from contextlib import suppress

import pytest

from rlt.errors import Refused
from rlt.generation.ended import EngineEnded
from rlt.workers.threads import ProcessOfThreads

LIMIT_S = 60
met = threading.Barrier(3)


def begin() -> None:
    os.environ["BEGUN"] = "yes"


def meet(number: int) -> tuple[int, str, int]:
    met.wait(LIMIT_S)
    return number, os.environ["BEGUN"], os.getpid()


def refuse() -> None:
    raise Refused("no")


def fail() -> None:
    raise EngineEnded("gone")


@pytest.fixture
def process():
    made = ProcessOfThreads(begin, 3)
    yield made
    made.shutdown(wait=False, cancel_futures=True)


def test_calls_meet_in_one_process_that_was_prepared(process):
    answers = [each.result(LIMIT_S) for each in [process.submit(meet, number) for number in range(3)]]
    assert [(number, begun) for number, begun, _ in answers] == [(number, "yes") for number in range(3)]
    assert len({pid for _, _, pid in answers} - {os.getpid()}) == 1


def test_an_error_is_its_callers_alone(process):
    with pytest.raises(Refused, match="no"):
        process.submit(refuse).result(LIMIT_S)
    assert process.submit(os.getpid).result(LIMIT_S) != os.getpid()


@pytest.mark.parametrize("how", ["killed", "engine"])
def test_what_waits_when_the_process_ends_is_told_so(process, how):
    pid = process.submit(os.getpid).result(LIMIT_S)
    waiting = process.submit(time.sleep, LIMIT_S)
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
    else:
        process.submit(fail)
    with pytest.raises(BrokenExecutor):
        waiting.result(LIMIT_S)
    with pytest.raises(BrokenExecutor):
        process.submit(os.getpid)


def test_a_process_that_is_not_needed_any_more_ends(process):
    pid = process.submit(os.getpid).result(LIMIT_S)
    given_up = process.submit(time.sleep, 0.2)
    assert given_up.cancel()
    process.shutdown(wait=True)
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
