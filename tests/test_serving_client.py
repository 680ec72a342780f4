"""The project's own clients against a real server: in a script, in a coroutine, and without torch."""

import asyncio
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("sqlalchemy")

from serving_process import KEYS  # noqa: E402
from serving_server import server  # noqa: E402

from rlt.errors import Refused  # noqa: E402
from rlt.serving import AsyncClient, Client, FutureGroup  # noqa: E402
from rlt.serving.client import RequestFailed, datum  # noqa: E402
from rlt.wire.values import AdamParams, Datum, SamplingParams  # noqa: E402

RATE = AdamParams(learning_rate=0.1)


def data(*targets: int) -> list:
    return [datum([1] * len(targets), target_tokens=list(targets))]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with server(tmp_path_factory.mktemp("serving") / "state") as (_, http):
        yield str(http.base_url)


def test_a_script_trains_saves_and_samples(address):
    with Client(address, KEYS["a"], tags=["x"]) as service:
        training = service.create_model("unigram", rank=8)
        losses = [training.train_batch(data(5, 6), "cross_entropy", RATE)["loss:sum"] for _ in range(3)]
        assert losses == sorted(losses, reverse=True)
        path = training.save_state("a").result()["path"]
        again = service.model_from_state(path)
        steps = [each.train_epoch([data(5, 6)] * 3, "cross_entropy", RATE) for each in (training, again)]
        assert steps[0] == steps[1]
        sampler = training.save_for_sampling()
        response = sampler.sample([1, 2], SamplingParams(max_tokens=4, seed=1, stop=[]), num_samples=2).result()
        assert [each.tokens.size for each in response.sequences] == [4, 4]
        assert np.isnan(sampler.compute_logprobs([1, 2]).result().prompt_logprobs[0])
        assert service.sampler(base_model="unigram").sample([1]).result().sequences


def test_a_coroutine_awaits_the_same_operations(address):
    async def story() -> list[float]:
        service = AsyncClient(address, KEYS["a"])
        training = await service.create_model("unigram")
        reads = [training.forward_backward(data(number), "cross_entropy") for number in range(20)]
        assert (await training.optim_step(RATE))["metrics"]["grad_norm"] > 0
        losses = [(await each).metrics["loss:sum"] for each in reads]
        sampler = await service.sampler(base_model="unigram")
        seen = [place async for place, _ in sampler.stream([[1], [2], [3]], SamplingParams(max_tokens=2))]
        assert sorted(seen) == [0, 1, 2]
        await asyncio.to_thread(service.close)
        return losses

    assert asyncio.run(story()) == pytest.approx([np.log(256)] * 20)


def test_failures_say_whose_fault_they_were(address):
    with Client(address, KEYS["a"]) as service:
        training = service.create_model("unigram")
        with pytest.raises(RequestFailed, match="ppo") as failed:
            training.forward(data(1), "ppo").result()
        assert failed.value.category == "user"
        with pytest.raises(RequestFailed, match="gpt-5"):
            service.create_model("gpt-5")
        with pytest.raises(Refused, match="no path of a checkpoint"):
            service.sampler(path="x")
        assert training.train_batch(data(1), "cross_entropy", RATE)["loss:sum"] > 0
    with pytest.raises(Refused, match="401"):
        Client(address, "tml-wrong-key")


def test_groups_wait_for_all_or_for_one_and_cancel(tmp_path):
    with server(tmp_path / "state", seconds=0.3) as (_, http), Client(str(http.base_url), KEYS["a"]) as service:
        sampler = service.sampler(base_model="unigram")
        group = FutureGroup([sampler.sample([1]) for _ in range(3)])
        assert group.wait_any(10).done()  # whichever came to the server first
        assert len(group.wait_all(10)) == 3
        slow = FutureGroup([sampler.sample([1]) for _ in range(20)])
        with pytest.raises(TimeoutError, match="no answer within 0.5 s"):
            slow.wait_all(0.5)
        began = time.monotonic()
        sampler.sample([1]).result(10)
        assert time.monotonic() - began < 3  # the server did not work through what was given up
        with pytest.raises(TimeoutError):
            sampler.sample([1]).result(0.05)


def test_a_client_goes_on_when_the_server_comes_back(tmp_path):
    folder = tmp_path / "state"
    with server(folder, seconds=0.05) as (process, http):
        address, port = str(http.base_url), http.base_url.port
        service = Client(address, KEYS["a"])
        training = service.create_model("unigram")
        sent = [training.forward_backward(data(number), "cross_entropy") for number in range(30)]
        sent[3].result(30)
        process.send_signal(signal.SIGKILL)
    back = threading.Event()
    with server(folder, port=port):
        assert all(each.result(60).metrics for each in sent)
        assert training.optim_step(RATE).result(30)["metrics"]["grad_norm"] > 0
        service.close()
        back.set()
    assert back.is_set()


class Cutter(socketserver.ThreadingTCPServer):
    """A line to a server that is cut once at each of some kinds of request: so many bytes into its answer."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, port: int, cuts: dict[bytes, int]):
        self.port, self.cuts, self.cut = port, cuts, []
        super().__init__(("127.0.0.1", 0), Line)


class Line(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.left = None
        with socket.create_connection(("127.0.0.1", self.server.port)) as beyond:
            back = threading.Thread(target=self.carry_back, args=(beyond,), daemon=True)
            back.start()
            while said := self.request.recv(65536):
                if kind := next((kind for kind in self.server.cuts if said.startswith(kind)), None):
                    self.left = self.server.cuts.pop(kind)
                    self.server.cut.append(kind)
                beyond.sendall(said)
            beyond.shutdown(socket.SHUT_WR)
            back.join(10)

    def carry_back(self, beyond: socket.socket) -> None:
        while said := beyond.recv(65536):
            if self.left is not None:
                self.request.sendall(said[: self.left])
                self.request.shutdown(socket.SHUT_RDWR)
                return
            self.request.sendall(said)


def test_a_download_goes_on_where_its_line_is_cut(address, tmp_path):
    """Amid a file, and as the server has removed its copy and nobody hears of it."""
    cuts = {b"GET /api/v1/downloads": 400, b"DELETE /api/v1/training_runs": 0}
    port = int(address.rpartition(":")[2])
    with Cutter(port, dict(cuts)) as line, Client(address, KEYS["a"]) as direct:
        threading.Thread(target=line.serve_forever, daemon=True).start()
        path = direct.create_model("unigram").save_state("cut").result(20)["path"]
        whole = direct.model_from_state(path).download(tmp_path / "whole")
        with Client(f"http://127.0.0.1:{line.server_address[1]}", KEYS["a"]) as service:
            got = service.model_from_state(path).download(tmp_path / "got")
        line.shutdown()
    assert line.cut == list(cuts)
    files = {each.name: each.read_bytes() for each in whole.iterdir()}
    assert {each.name: each.read_bytes() for each in got.iterdir()} == files != {}
    assert max(map(len, files.values())) > 0


def test_what_is_given_up_before_it_was_sent_leaves_no_gap(address):
    """Later requests of a model wait for every number before theirs."""
    with Client(address, KEYS["a"]) as service:
        training = service.create_model("unigram")
        for number in range(5):
            training.forward_backward(data(number), "cross_entropy").cancel()
        with pytest.raises(TypeError):
            training.save_state("a", ttl_seconds=object())
        with pytest.raises(ValueError):
            training.forward_backward([Datum(np.array(["x"]), {})], "cross_entropy")
        assert training.optim_step(RATE).result(20)["metrics"]["grad_norm"] > 0


def test_a_coroutines_time_limit_cancels_on_the_server(tmp_path):
    async def story(address: str) -> float:
        async with AsyncClient(address, KEYS["a"]) as service:
            sampler = await service.sampler(base_model="unigram")
            for each in [sampler.sample([1]) for _ in range(20)]:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(each, 0.01)
            began = time.monotonic()
            await sampler.sample([1])
            return time.monotonic() - began

    with server(tmp_path / "state", seconds=0.3) as (_, http):
        assert asyncio.run(story(str(http.base_url))) < 3


def test_a_stream_that_is_left_early_cancels_the_rest(tmp_path):
    async def story(address: str) -> float:
        async with AsyncClient(address, KEYS["a"]) as service:
            sampler = await service.sampler(base_model="unigram")
            stream = sampler.stream([[1]] * 20, SamplingParams(max_tokens=2))
            await anext(stream)  # whichever comes first
            await stream.aclose()
            began = time.monotonic()
            await sampler.sample([1])
            return time.monotonic() - began

    with server(tmp_path / "state", seconds=0.3) as (_, http):
        assert asyncio.run(story(str(http.base_url))) < 3


def test_figures_of_the_server_are_read_by_name(address):
    with Client(address, KEYS["a"]) as service:
        training = service.create_model("unigram")
        training.train_batch(data(1), "cross_entropy", RATE)
        figures = service.get_metrics()
        assert figures['rlt_requests_ended_total{kind="optim_step",outcome="done"}'] >= 1
        assert figures["rlt_process_memory_bytes"] > 2**20
        assert service.models() == ["unigram", "other"]


def test_embeddings_are_numbered_as_training_is(address):
    with Client(address, KEYS["a"]) as service:
        training = service.create_model("unigram")
        before, step, after = training.embeddings([[1], [2, 3]]), None, None
        training.forward_backward(data(1), "cross_entropy")
        step, after = training.optim_step(RATE), training.embeddings([[1]])
        assert step.result(20) and before.result(20).shape == (2, 4)
        assert not before.result(20).any() and after.result(20).any()


def test_a_client_that_is_closed_leaves_no_thread_and_no_file(address):
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    counts = []
    for _ in range(4):
        with Client(address, KEYS["a"]) as service:
            service.create_model("unigram").forward(data(1), "cross_entropy")  # never waited for
        with pytest.raises(Refused, match="401"):
            Client(address, "tml-wrong-key")
        counts.append((threading.active_count(), open_files()))
    assert counts[1:] == counts[:1] * 3
    service.close()  # once more does nothing


def test_clients_need_no_torch():
    heavy = "{'torch', 'sqlalchemy', 'fastapi'}"
    code = f"import sys; from rlt.serving import Client; assert not {heavy} & sys.modules.keys()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)
