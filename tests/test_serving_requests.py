"""Requests of the training API: order, once each, held polls, gaps, failures, and a server that is killed."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import psutil
import pytest
from conftest import ROOT

pytest.importorskip("sqlalchemy")

from serving_process import KEYS, batch, new_model, settings, step, submission, work  # noqa: E402
from serving_unigram import Unigram, log_softmax  # noqa: E402

from rlt.errors import Refused  # noqa: E402
from rlt.serving.errors import Busy, Gone, Missing  # noqa: E402
from rlt.serving.kinds import dump  # noqa: E402
from rlt.serving.requests.order import Patience  # noqa: E402
from rlt.serving.requests.rows import failure  # noqa: E402
from rlt.serving.service import Service  # noqa: E402
from rlt.wire import protobuf  # noqa: E402
from rlt.workers.processes import ProcessExecutor  # noqa: E402
from rlt.workers.worker import ThreadExecutor  # noqa: E402

PROCESS_S = 60


def served(folder, story, worker=None, executor=None, **changes):
    """Run a story against a started service, and close it."""

    async def whole():
        service = Service(settings(folder, **changes), executor or ThreadExecutor(worker or Unigram()))
        await service.start(KEYS)
        try:
            return await asyncio.wait_for(story(service), 60)
        finally:
            await service.close()

    return asyncio.run(whole())


async def logits_after(service, numbers) -> list[float]:
    model_id = await new_model(service)
    ids = [await service.submit(work(model_id, number)) for number in numbers]
    for request_id in ids:
        assert (await service.requests.poll(request_id, "a")).state == "done"
    return service.executor.worker.models[model_id].logits.tolist()


def test_requests_that_come_in_any_order_are_executed_in_their_numbers(tmp_path):
    numbers = list(range(1, 13))
    shuffled = random.Random(1).sample(numbers, len(numbers))
    for name, order in (("straight", numbers), ("shuffled", shuffled)):
        worker = Unigram()
        (tmp_path / name).mkdir()
        logits = served(tmp_path / name, partial(logits_after, numbers=order), worker)
        assert [number for _, number in worker.executed] == numbers[::2]
        if name == "straight":
            expected = logits
    assert logits == expected


def test_a_request_that_is_sent_twice_is_executed_once(tmp_path):
    async def story(service):
        model_id = await new_model(service)
        ids = await asyncio.gather(*(service.submit(work(model_id, 1)) for _ in range(5)))
        row = await service.requests.poll(ids[0], "a")
        again = await service.submit(work(model_id, 1))
        assert {*ids, again} == {row.id}
        assert (await service.requests.poll(again, "a")).result == row.result
        return service.executor.worker.executed

    assert len(served(tmp_path, story)) == 1


def test_a_poll_is_held_and_woken_by_the_answer(tmp_path):
    async def story(service):
        model_id = await new_model(service)
        began = time.monotonic()
        request_id = await service.submit(work(model_id, 1))
        assert time.monotonic() - began < 0.3  # the submit does not wait for the work
        row = await service.requests.poll(request_id, "a")
        return row.state, time.monotonic() - began

    state, seconds = served(tmp_path, story, Unigram(seconds=0.5))
    assert state == "done"
    assert 0.5 <= seconds < 2


def test_two_hundred_open_polls_cost_next_to_nothing(tmp_path):
    async def story(service):
        model_id = await new_model(service)
        request_id = await service.submit(work(model_id, 2))  # waits for the first number
        polls = [asyncio.create_task(service.requests.poll(request_id, "a")) for _ in range(200)]
        await asyncio.sleep(0.1)
        before = time.process_time()
        await asyncio.sleep(1.5)
        spent = time.process_time() - before
        assert all(answer is None for answer in await asyncio.gather(*polls))
        return spent

    assert served(tmp_path, story, patience=Patience(hold_s=2)) < 0.05 * 1.5


def test_a_number_that_never_comes_fails_those_behind_it_and_no_later_ones(tmp_path):
    async def story(service):
        model_id = await new_model(service)
        behind = [await service.submit(work(model_id, number)) for number in (4, 3)]
        rows = [await service.requests.poll(request_id, "a") for request_id in behind]
        assert {row.category for row in rows} == {"server"}
        assert "the request 1 of" in rows[0].error
        late = await service.requests.poll(await service.submit(work(model_id, 1)), "a")
        assert "given it up" in late.error
        assert (await service.requests.poll(await service.submit(work(model_id, 5)), "a")).state == "done"
        return service.executor.worker.executed

    assert [number for _, number in served(tmp_path, story, patience=Patience(gap_s=0.3))] == [5]


def test_later_arrivals_do_not_prolong_the_time_of_a_missing_number(tmp_path):
    async def story(service):
        model_id = await new_model(service)
        poll = asyncio.create_task(service.requests.poll(await service.submit(work(model_id, 2)), "a"))
        for number in range(3, 100):
            await asyncio.sleep(0.1)
            if poll.done():
                return number
            await service.submit(work(model_id, number))
        return 100

    assert served(tmp_path, story, patience=Patience(gap_s=0.3)) < 50


def test_a_closed_gap_stays_closed_after_a_restart(tmp_path):
    async def story(service):
        model_id = await new_model(service)
        await service.requests.poll(await service.submit(work(model_id, 3)), "a")
        return model_id

    model_id = served(tmp_path, story, patience=Patience(gap_s=0.2))

    async def later(service):
        late = await service.requests.poll(await service.submit(work(model_id, 2)), "a")
        on = await service.requests.poll(await service.submit(work(model_id, 5)), "a")
        return late.state, on

    assert served(tmp_path, later, patience=Patience(gap_s=30, hold_s=0.3)) == ("failed", None)


def test_a_refused_request_uses_its_number_and_says_whose_fault_it_was(tmp_path):
    async def story(service):
        model_id = await new_model(service)
        refused = submission(model_id, 1, "forward_backward", None, refusal="weights holds numbers that are not finite")
        unknown = submission(model_id, 2, "forward_backward", batch(model_id, 2, [1], "stable"))
        rows = [await service.requests.poll(await service.submit(each), "a") for each in (refused, unknown)]
        after = await service.requests.poll(await service.submit(work(model_id, 3)), "a")
        return [failure(row) for row in rows], after.state

    failures, after = served(tmp_path, story)
    assert failures[0] == {"error": "weights holds numbers that are not finite", "category": "user"}
    assert failures[1]["category"] == "user"
    assert "stable" in failures[1]["error"]
    assert after == "done"


def test_a_defect_of_the_worker_is_the_servers_fault_and_the_next_request_works(tmp_path):
    async def story(service):
        model_id = await new_model(service)
        kept = service.executor.worker.models.pop(model_id)
        row = await service.requests.poll(await service.submit(work(model_id, 1)), "a")
        service.executor.worker.models[model_id] = kept
        after = await service.requests.poll(await service.submit(work(model_id, 2)), "a")
        return row.category, after.state

    assert served(tmp_path, story) == ("server", "done")


def test_unknown_foreign_and_old_requests_are_told_apart(tmp_path):
    async def story(service):
        model_id = await new_model(service)
        request_id = await service.submit(work(model_id, 1))
        assert await service.requests.poll(request_id, "a")
        for name, tenant in (("nothing", "a"), (request_id, "b")):
            with pytest.raises(Missing):
                await service.requests.poll(name, tenant)
        with pytest.raises(Missing):
            await service.submit(submission(model_id, 1, "optim_step", b"{}", tenant="b"))
        await service.sweep()
        with pytest.raises(Gone):
            await service.requests.poll(request_id, "a")

    served(tmp_path, story, patience=Patience(keep_s=0))


def test_numbers_far_ahead_are_refused_and_samples_number_in_64_bits(tmp_path):
    async def story(service):
        model_id = await new_model(service)
        with pytest.raises(Refused, match="numbers ahead"):
            await service.submit(work(model_id, 2**31 - 1))
        sample = {"sampling_session_id": "x", "seq_id": 10**18, "prompt": {"chunks": [{"tokens": [1]}]}}
        request_id = await service.submit(submission("s:sample:0", 10**18, "sample", dump(sample)))
        return await service.requests.poll(request_id, "a")

    assert "no longer there" in served(tmp_path, story).error


def test_a_full_queue_of_samples_is_busy(tmp_path):
    async def story(service):
        sample = {"sampling_session_id": "x", "seq_id": 1, "prompt": {"chunks": [{"tokens": [1]}]}}
        await service.submit(submission("s:sample:0", 1, "sample", dump(sample)))
        with pytest.raises(Busy):
            await service.submit(submission("s:sample:0", 2, "sample", dump(sample)))

    served(tmp_path, story, samples_waiting=1)


def test_forward_only_changes_nothing(tmp_path):
    async def story(service):
        model_id = await new_model(service)
        only = submission(model_id, 1, "forward", batch(model_id, 1, [5, 6], forward_only=True))
        row = await service.requests.poll(await service.submit(only), "a")
        assert protobuf.read_output(row.result).metrics["loss:sum"] > 0
        await service.requests.poll(await service.submit(step(model_id, 2)), "a")
        return service.executor.worker.models[model_id].logits

    assert not served(tmp_path, story).any()


def training_process() -> psutil.Process:
    """Of the two that a server starts, the one that trains was asked first."""
    spawned = [each for each in psutil.Process().children() if "spawn_main" in " ".join(each.cmdline())]
    return min(spawned, key=lambda each: each.create_time())


def test_a_worker_that_is_lost_is_replaced_and_nothing_is_lost_with_it(tmp_path):
    async def story(service):
        model_id = await new_model(service)
        ids = [await service.submit(work(model_id, number)) for number in range(1, 13)]
        await service.requests.poll(ids[4], "a")
        training_process().kill()
        states = [(await service.requests.poll(request_id, "a")).state for request_id in ids]
        assert service.requests.lives == 1
        last = await service.requests.poll(await service.submit(work(model_id, 13)), "a")
        return states, protobuf.read_output(last.result).metrics["loss:sum"]

    executor = ProcessExecutor(partial(Unigram, 0.05), tmp_path / "scratch")
    states, loss = served(tmp_path, story, executor=executor, keep_every=4)
    assert states == ["done"] * 12
    (tmp_path / "calm").mkdir()
    calm = served(tmp_path / "calm", partial(logits_after, numbers=range(1, 13)))
    lps = log_softmax(np.array(calm))
    assert loss == pytest.approx(-(lps[13 % 7] + lps[3]), abs=1e-12)


def process(folder, act: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tests" / "serving_process.py"), str(folder), act]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("seconds", [0.02, 0.35, 0.8])
def test_a_killed_server_answers_what_it_promised(tmp_path, seconds):
    first = process(tmp_path, "submit")
    promise, end = tmp_path / "promise.json", time.monotonic() + PROCESS_S
    while not promise.exists() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(seconds)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=PROCESS_S)
    second = process(tmp_path, "resume")
    said = json.loads(second.communicate(timeout=PROCESS_S)[0])
    assert said["states"] == ["done"] * 20
    (tmp_path / "calm").mkdir()
    assert said["logits"] == served(tmp_path / "calm", partial(logits_after, numbers=range(1, 21)))
