"""What cannot be done ends in its documented error, and the server goes on: `serve.py` as it is, with real models."""

import contextlib
import os
import random
import socket
import subprocess
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

pytest.importorskip("sqlalchemy")

from serving_kills import KEY, Mortal, unigram_folder  # noqa: E402
from serving_process import batch  # noqa: E402
from serving_server import post, result  # noqa: E402

from rlt.serving.client import Client, RequestFailed, datum  # noqa: E402
from rlt.wire.values import AdamParams, SamplingParams  # noqa: E402

OTHER = "tml-bbbbbbbbbbbb"
LIMIT_S = 120
MIB = 2**20
PROTOBUF = {"Content-Type": "application/x-protobuf"}
ODD_IDS = (
    "a/b",
    "..",
    "../../x",
    "%2e%2e",
    "a b",
    "ä",
    "☃",
    "a\u202eb",
    "x" * 5000,
    "'; DROP TABLE models; --",
    "{0}",
    "%s",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_teacher, tiny_student):
    folder = tmp_path_factory.mktemp("served")
    with Mortal(folder, f"{tiny_teacher},{tiny_student}", key=f"a={KEY},b={OTHER}") as server:
        yield server
        assert server.process.poll() is None
        assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def client(server):
    with Client(server.address, KEY) as client:
        yield client


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.address, headers={"X-API-Key": KEY}, timeout=60) as http:
        yield http


def good() -> list:
    return [datum([5, 6, 7], target_tokens=[6, 7, 8])]


def step(model) -> float:
    return model.train_batch(good(), "cross_entropy", AdamParams(1e-3))["loss:sum"]


@pytest.mark.parametrize(
    ("data", "loss", "said"),
    [
        (good(), "no_loss", "no_loss"),
        (good(), "stable_reinforce", "stable_reinforce"),
        (good(), "ppo", "logprobs"),
        ([datum([10**6], target_tokens=[1])], "cross_entropy", "0 to"),
        ([datum([5], target_tokens=[10**6])], "cross_entropy", "target_tokens"),
        ([datum([5], target_tokens=[-1])], "cross_entropy", "target_tokens"),
        ([datum([5, 6], target_tokens=[5])], "cross_entropy", "target_tokens"),
        ([datum([5], target_tokens=[5], weights=[float("nan")])], "cross_entropy", "not finite"),
        ([datum([5], target_tokens=[5], weights=[float("inf")])], "cross_entropy", "not finite"),
        ([datum([5, 6], target_tokens=[5, 6], weights=[1.0])], "cross_entropy", "weights"),
        ([], "cross_entropy", "0 datums"),
        ([datum([], target_tokens=[])], "cross_entropy", "no tokens"),
        ([datum([5] * 3000, target_tokens=[5] * 3000)], "cross_entropy", "2048"),
    ],
)
def test_data_that_cannot_be_trained_on_fails_and_changes_nothing(client, tiny_teacher, data, loss, said):
    model = client.create_model(tiny_teacher, rank=4, seed=1)
    with pytest.raises(RequestFailed, match=said) as failed:
        model.forward_backward(data, loss).result(LIMIT_S)
    assert failed.value.category == "user"
    assert step(model) == step(client.create_model(tiny_teacher, rank=4, seed=1))


@pytest.mark.parametrize(
    "change", [{"learning_rate": -1}, {"learning_rate": 1e38}, {"beta1": 1.5}, {"eps": "x"}, {"beta2": True}]
)
def test_steps_that_cannot_be_made_fail(client, tiny_teacher, change):
    model = client.create_model(tiny_teacher, rank=4)
    with pytest.raises(RequestFailed) as failed:
        model.request("optim_step", adam_params=change).result(LIMIT_S)
    assert failed.value.category == "user"
    assert step(model) > 0


def test_weights_that_are_no_numbers_any_more_say_so_and_harm_nobody_else(client, tiny_teacher):
    broken, other = (client.create_model(tiny_teacher, rank=4, seed=2) for _ in range(2))
    first = step(other)
    assert broken.train_batch(good(), "cross_entropy", AdamParams(1e30))["loss:sum"] == first
    for _ in range(2):
        with contextlib.suppress(RequestFailed):
            broken.forward_backward(good(), "cross_entropy").result(LIMIT_S)
            broken.optim_step(AdamParams(1e30)).result(LIMIT_S)
    with pytest.raises(RequestFailed) as failed:
        broken.forward_backward(good(), "cross_entropy").result(LIMIT_S)
    assert failed.value.category == "user"
    assert step(other) < first


def test_models_and_samplers_of_what_is_not_here_fail(client, tiny_teacher, http):
    with pytest.raises(RequestFailed, match="gpt-5"):
        client.create_model("gpt-5")
    for lora in ({"rank": 0}, {"rank": 10**9}, {"rank": 4.5}, {"rank": "x"}, {"rank": 4, "seed": "x"}):
        form = {"session_id": client.session_id, "model_seq_id": 1000 + len(str(lora)), "base_model": tiny_teacher}
        assert result(http, post(http, "create_model", form | {"lora_config": lora}))["category"] == "user"
    for more in ({"optimizer_config": {"type": "dimuon"}}, {"optimizer_config": {"type": 5}}):
        form = {"session_id": client.session_id, "model_seq_id": 2000 + len(str(more)), "base_model": tiny_teacher}
        assert "optimizer" in result(http, post(http, "create_model", form | more))["error"]
    form = {"session_id": client.session_id, "sampling_session_seq_id": 9000, "base_model": "gpt-5"}
    assert "gpt-5" in post(http, "create_sampling_session", form, 400)["detail"]


def test_weights_of_another_rank_or_base_are_not_loaded(client, tiny_teacher, tiny_student):
    path = client.create_model(tiny_teacher, rank=4).save_state("four").result(LIMIT_S)["path"]
    other_rank, other_base = client.create_model(tiny_teacher, rank=8), client.create_model(tiny_student, rank=4)
    for model, said in ((other_rank, "rank"), (other_base, "is of")):
        with pytest.raises(RequestFailed, match=said) as failed:
            model.load_state(path).result(LIMIT_S)
        assert failed.value.category == "user"
        assert step(model) > 0


@pytest.mark.parametrize(
    "path",
    ["tinker://../../etc/weights/passwd", "tinker://x/weights/../../../etc/passwd", "tinker://x/weights/..",
     "/etc/passwd", "file:///etc/passwd", "s3://bucket/x", "tinker://x/weights/a\0b", "tinker://", 5, None,
     "tinker://x/weights/" + "a" * 300],
)  # fmt: skip
def test_paths_that_leave_the_state_are_none(http, client, tiny_teacher, path):
    post(http, "weights_info", {"tinker_path": path}, 400)
    form = {"session_id": client.session_id, "sampling_session_seq_id": 9001, "model_path": path}
    post(http, "create_sampling_session", form, 400)
    post(http, "copy_weights", {"source_path": path, "destination_project_id": "p"}, 400)
    model = client.create_model(tiny_teacher, rank=4)
    form = {"model_id": model.model_id, "seq_id": 1, "path": path}
    assert result(http, post(http, "load_weights", form))["category"] == "user"


def test_names_that_are_no_names_are_not_saved_under(http, client, tiny_teacher):
    model = client.create_model(tiny_teacher, rank=4)
    names = ["a/b", "..", ".", "", "x" * 201, "a\0b", "a\nb", "\ud800", 5, ["a"]]
    for number, name in enumerate(names, 1):
        form = {"model_id": model.model_id, "seq_id": number, "path": name}
        assert result(http, post(http, "save_weights", form))["category"] == "user", name
    for number, name in enumerate(("ä ☃", "a:b", "%2e%2e", "a'b\"c", "a\\b", "CON"), len(names) + 1):
        form = {"model_id": model.model_id, "seq_id": number, "path": name}
        path = result(http, post(http, "save_weights", form))["path"]
        assert post(http, "weights_info", {"tinker_path": path})["lora_rank"] == 4


def test_ids_with_odd_characters_are_not_known(http):
    for each in ODD_IDS:
        for route in ("session_heartbeat", "get_info", "retrieve_future", "cancel_future"):
            form = {"session_id": each, "model_id": each, "request_id": each}
            assert http.post(f"/api/v1/{route}", json=form).status_code in (400, 404), (route, each[:50])
        quoted = httpx.URL(f"{http.base_url}").copy_with(path=f"/api/v1/training_runs/{each}")
        assert http.get(quoted).status_code in (400, 404), each[:50]
        assert "." in each or http.get(f"{quoted}/checkpoints").status_code in (400, 404)


def test_another_tenants_weights_are_not_there(server, client, tiny_teacher):
    path = client.create_model(tiny_teacher, rank=4).save_state("mine").result(LIMIT_S)["path"]
    with Client(server.address, OTHER) as other:
        with pytest.raises(RequestFailed, match="not known"):
            other.model_from_state(path)
        with httpx.Client(base_url=server.address, headers={"X-API-Key": OTHER}) as http:
            post(http, "weights_info", {"tinker_path": path}, 404)
            post(http, "copy_weights", {"source_path": path, "destination_project_id": "p"}, 404)
            assert path.split("/")[2] not in http.get("/").text


def test_random_and_spoiled_messages_are_refused(http, client, tiny_teacher):
    model = client.create_model(tiny_teacher, rank=4)
    chance, whole = random.Random(3), batch(model.model_id, 1, [5, 6, 7])
    for number in range(300):
        raw = bytearray(chance.randbytes(chance.randrange(400)) if number % 3 == 0 else whole)
        for _ in range(chance.randrange(1, 6)):
            place = chance.randrange(len(raw) + 1)
            raw[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(4))
        answer = http.post("/api/v1/forward_backward", content=bytes(raw), headers=PROTOBUF)
        assert answer.status_code in (200, 400, 404, 410), answer.text[:300]
    assert step(client.create_model(tiny_teacher, rank=4)) > 0


def test_a_hundred_mebibytes_are_refused_and_not_kept(server, http):
    own = psutil.Process(server.process.pid)
    before = own.memory_info().rss
    for content in (bytes(100 * MIB), (bytes(MIB) for _ in range(100))):
        with contextlib.suppress(httpx.TransportError):  # the server closes while much is still to come
            assert http.post("/api/v1/forward_backward", content=content, headers=PROTOBUF).status_code == 413
    bomb = {"Content-Encoding": "zstd", **PROTOBUF}
    assert http.post("/api/v1/forward_backward", content=b"\x28\xb5\x2f\xfd" * 100, headers=bomb).status_code == 415
    assert own.memory_info().rss - before < 64 * MIB
    assert http.get("/healthz").json() == {"status": "ok"}


def raw_socket(server: Mortal) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def test_clients_that_vanish_leave_nothing_open(server, http, client, tiny_teacher):
    model = client.create_model(tiny_teacher, rank=4)
    files = Path(f"/proc/{server.process.pid}/fd")
    before = len(list(files.iterdir()))
    head = f"POST /api/v1/retrieve_future HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\n"
    waiting = post(http, "optim_step", {"model_id": model.model_id, "seq_id": 50})["request_id"]
    form = f'{{"request_id": "{waiting}"}}'
    for number in range(60):
        with raw_socket(server) as each:
            if number % 3 == 0:
                each.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
            elif number % 3 == 1:
                each.sendall(f"{head}Content-Length: 100000\r\n\r\nhalf of".encode())
            else:  # a poll that would be held
                each.sendall(f"{head}Content-Length: {len(form)}\r\n\r\n{form}".encode())
                time.sleep(0.02)
    end = time.monotonic() + 40  # polls are held for 30 s
    while len(list(files.iterdir())) > before and time.monotonic() < end:
        time.sleep(0.5)
    assert len(list(files.iterdir())) <= before
    assert step(client.create_model(tiny_teacher, rank=4)) > 0


def test_samples_beyond_the_context_or_of_nothing_fail(client, tiny_teacher):
    sampler = client.sampler(base_model=tiny_teacher)
    for prompt, params, said in (
        ([5], SamplingParams(max_tokens=5000), "context"),
        ([5] * 3000, SamplingParams(max_tokens=1), "context"),
        ([], SamplingParams(max_tokens=1), "no tokens"),
        ([10**6], SamplingParams(max_tokens=1), "1000000"),
    ):
        with pytest.raises(RequestFailed, match=said) as failed:
            sampler.sample(prompt, params).result(LIMIT_S)
        assert failed.value.category == "user"
    assert sampler.sample([5], SamplingParams(max_tokens=2)).result(LIMIT_S).sequences


def test_a_save_that_finds_no_room_fails_and_training_goes_on(tmp_path):
    base_model = unigram_folder(tmp_path / "unigram")
    served = Mortal(tmp_path / "served", base_model, {"file_bytes": 2000}, words=["keep_every=4"])
    with served as server, Client(server.address, KEY) as client:
        model = client.create_model(base_model)
        for _ in range(4):
            assert step(model) > 0
        for saving in (lambda: model.save_state("a").result(30), model.save_for_sampling):
            with pytest.raises(RequestFailed, match="File too large") as failed:
                saving()
            assert failed.value.category == "server"
        assert step(model) > 0
        assert "could not be kept" in server.log
        assert "Traceback" not in server.log


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two mebibytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "rlt-test", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_full_for_a_while_loses_nothing(small_disk, tmp_path):
    base_model, ballast = unigram_folder(tmp_path / "unigram"), small_disk / "ballast"
    losses = []
    for name in ("calm", "full"):
        folder = tmp_path / name if name == "calm" else small_disk
        with Mortal(folder, base_model, {}) as server, Client(server.address, KEY) as client:
            model = client.create_model(base_model)
            step(model)
            if name == "full":
                with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            sent = [model.forward_backward(good(), "cross_entropy") for _ in range(20)]
            time.sleep(3)
            ballast.unlink(missing_ok=True)
            losses.append([each.result(LIMIT_S).metrics["loss:sum"] for each in sent])
            losses[-1].append(step(model))
            assert model.save_state("a").result(LIMIT_S)["path"]
            assert "Traceback" not in server.log
    assert losses[0] == losses[1]
    assert np.isfinite(losses[0]).all()
