"""Operations of one worker: in order, awaited or waited for, cancelled before they begin."""

import asyncio
import gc
import threading
from concurrent.futures import CancelledError

import pytest

from backends.futures import Worker
from rlt.errors import Refused

LIMIT_S = 10


@pytest.fixture
def worker():
    worker = Worker("a test")
    yield worker
    worker.close()


def held(worker: Worker):
    """An operation that has begun, and goes on until its event is set."""
    begun, go_on = threading.Event(), threading.Event()
    future = worker.submit(lambda: (begun.set(), go_on.wait(LIMIT_S)))
    assert begun.wait(LIMIT_S)
    return future, go_on


def test_what_is_asked_is_done_in_order_on_one_thread(worker):
    done = []
    futures = [worker.submit(lambda n: done.append((n, threading.get_ident())) or n, n) for n in range(50)]
    assert [future.result(LIMIT_S) for future in futures] == list(range(50))
    assert [n for n, _ in done] == list(range(50))
    assert len({thread for _, thread in done} - {threading.get_ident()}) == 1


def test_in_an_event_loop_the_result_is_awaited_and_with_a_timeout_it_is_the_value(worker):
    async def both():
        awaited = await worker.submit(lambda: 1).result()
        plain = await worker.submit(lambda: 2)
        return awaited, plain, worker.submit(lambda: 3).result(LIMIT_S), await worker.submit(lambda: 4).result()

    assert asyncio.run(both()) == (1, 2, 3, 4)
    assert worker.submit(lambda: 5).result() == 5


def test_the_loop_goes_on_while_an_operation_runs(worker):
    async def meanwhile():
        _, go_on = held(worker)
        future = worker.submit(lambda: "after")
        ticks = 0
        while ticks < 5:
            await asyncio.sleep(0.001)
            ticks += 1
        assert not future.done()
        go_on.set()
        return await future.result()

    assert asyncio.run(meanwhile()) == "after"


def test_what_an_operation_raises_comes_out_and_the_next_one_runs(worker):
    def fails():
        raise Refused("a bad batch")

    async def awaited():
        with pytest.raises(Refused, match="a bad batch"):
            await worker.submit(fails).result()

    with pytest.raises(Refused, match="a bad batch"):
        worker.submit(fails).result(LIMIT_S)
    asyncio.run(awaited())
    assert worker.submit(lambda: 1).result(LIMIT_S) == 1


def test_a_cancelled_operation_never_runs_and_one_that_has_begun_goes_on(worker):
    done = []
    first, go_on = held(worker)
    second = worker.submit(done.append, "second")
    third = worker.submit(done.append, "third")
    assert second.cancel() and second.done() and not first.cancel()
    go_on.set()
    third.result(LIMIT_S)
    assert done == ["third"]
    with pytest.raises(CancelledError):
        second.result(LIMIT_S)


def test_waiting_has_a_limit_and_the_operation_goes_on(worker):
    first, go_on = held(worker)
    with pytest.raises(TimeoutError, match="not ended within 0.01 s"):
        first.result(0.01)
    go_on.set()
    assert first.result(LIMIT_S)[1] is True


def test_an_awaiting_task_that_gives_up_takes_back_what_has_not_begun(worker):
    done = []

    async def gives_up():
        _, go_on = held(worker)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(worker.submit(done.append, 1).result(), 0.01)
        go_on.set()
        await worker.submit(lambda: None)

    asyncio.run(gives_up())
    assert done == []


def test_an_operation_that_would_wait_for_itself_is_refused(worker):
    with pytest.raises(Refused, match="ask outside"):
        worker.submit(lambda: worker.submit(lambda: 1).result(LIMIT_S)).result(LIMIT_S)


def test_a_closed_worker_refuses_and_gives_up_what_has_not_begun(worker):
    _, go_on = held(worker)
    waiting = worker.submit(lambda: 1)
    threading.Timer(0.05, go_on.set).start()
    worker.close()
    with pytest.raises(CancelledError):
        waiting.result(LIMIT_S)
    with pytest.raises(Refused, match="a test is closed"):
        worker.submit(lambda: 1)


def test_the_thread_of_a_worker_that_nobody_holds_ends():
    worker = Worker("forgotten")
    worker.submit(lambda: 1).result(LIMIT_S)
    (thread,) = (thread for thread in threading.enumerate() if thread.name.startswith("forgotten"))
    del worker
    gc.collect()
    thread.join(LIMIT_S)
    assert not thread.is_alive()
