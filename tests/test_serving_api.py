"""The training API over HTTP: routes, forms, refusals, tenants, and a server that is killed and comes back."""

import contextlib
import json
import os
import random
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

pytest.importorskip("sqlalchemy")

from serving_process import KEYS, batch  # noqa: E402
from serving_server import post, result, server  # noqa: E402

from rlt.wire import json_form, protobuf  # noqa: E402

PROTOBUF = {"Content-Type": "application/x-protobuf"}
LORA = {"rank": 8, "train_mlp": True, "train_attn": True, "train_unembed": False, "seed": 3}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with server(tmp_path_factory.mktemp("serving") / "state", hold_s=5, sweep_s=0.3) as (_, client):
        yield client


def new_session(client) -> str:
    return post(client, "create_session", {"tags": [], "sdk_version": "0.38.0", "type": "create_session"})["session_id"]


def new_model(client, number: int = 0, session_id: str | None = None, **more) -> str:
    session_id = session_id or new_session(client)
    form = {"session_id": session_id, "model_seq_id": number, "base_model": "unigram", "lora_config": LORA}
    made = result(client, post(client, "create_model", form | more))
    assert made == {"type": "create_model", "model_id": f"{session_id}:train:{number}", "path": None}
    return made["model_id"]


def read(client, model_id: str, seq_id: int, targets: list[int], **named) -> dict:
    return post(client, "forward_backward", content=batch(model_id, seq_id, targets, **named), headers=PROTOBUF)


def step(client, model_id: str, seq_id: int, rate: float = 0.5) -> dict:
    form = {"model_id": model_id, "seq_id": seq_id, "adam_params": {"learning_rate": rate}, "type": "optim_step"}
    return post(client, "optim_step", form)


def loss_of(client, submitted: dict) -> float:
    return protobuf.read_output(result(client, submitted, protobuf=True)).metrics["loss:sum"]


def save(client, route: str, model_id: str, seq_id: int, **more) -> dict:
    return result(client, post(client, route, {"model_id": model_id, "seq_id": seq_id, **more}))


def ask(sampler_id: str, seq_id: int = 0, **more) -> dict:
    params = {"max_tokens": 8, "seed": 5, "stop": []} | more.pop("params", {})
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
    return {"sampling_session_id": sampler_id, "seq_id": seq_id, "prompt": prompt, "sampling_params": params} | more


def test_a_loop_of_four_operations_learns_saves_loads_and_samples(client):
    model_id = new_model(client)
    losses = []
    for number in range(1, 7, 2):
        losses.append(loss_of(client, read(client, model_id, number, [5, 6])))
        assert result(client, step(client, model_id, number + 1))["metrics"]["grad_norm"] > 0
    assert losses[0] > losses[1] > losses[2]
    saved = save(client, "save_weights", model_id, 7, path="state")
    assert saved["path"] == f"tinker://{model_id}/weights/state"
    after = loss_of(client, read(client, model_id, 8, [5, 6]))
    form = {"session_id": model_id.split(":")[0], "model_seq_id": 1, "path": saved["path"], "optimizer": True}
    loaded = result(client, post(client, "load_weights", form))
    assert loaded["model_id"] == f"{form['session_id']}:train:1"
    assert loss_of(client, read(client, loaded["model_id"], 1, [5, 6])) == after
    info = post(client, "get_info", {"model_id": loaded["model_id"]})
    assert (info["is_lora"], info["lora_rank"], info["model_name"]) == (True, 8, "unigram")
    sampler = save(client, "save_weights_for_sampler", model_id, 9, sampling_session_seq_id=4)["sampling_session_id"]
    assert sampler == f"{form['session_id']}:sample:4"
    asked = post(client, "asample", ask(sampler, num_samples=3, prompt_logprobs=True))
    assert len(set(asked["sample_sequence_ids"])) == 3
    sample = protobuf.read_sample(result(client, asked, protobuf=True))
    assert [each.tokens.size for each in sample.sequences] == [8] * 3
    assert np.isnan(sample.prompt_logprobs[0])


def test_old_clients_speak_json_all_the_way(client):
    model_id = new_model(client)
    request = protobuf.read_request(batch(model_id, 1, [5, 6]))
    answer = result(client, post(client, "forward_backward", json_form.write_request(request)))
    assert answer["metrics"]["loss:sum"] == pytest.approx(2 * np.log(256))
    logprobs = answer["loss_fn_outputs"][0]["logprobs"]
    assert (logprobs["dtype"], logprobs["shape"]) == ("float32", [2])
    assert logprobs["data"] == pytest.approx([-np.log(256)] * 2)
    forward = json_form.write_request(protobuf.read_request(batch(model_id, 2, [5, 6], forward_only=True)))
    assert loss_of(client, post(client, "forward", forward)) == pytest.approx(2 * np.log(256))
    sampler = {"session_id": model_id.split(":")[0], "sampling_session_seq_id": 0, "base_model": "unigram"}
    sampler_id = post(client, "create_sampling_session", sampler)["sampling_session_id"]
    sample = result(client, post(client, "asample", ask(sampler_id)))
    assert (sample["type"], sample["sequences"][0]["stop_reason"]) == ("sample", "length")
    assert result(client, post(client, "unload_model", {"model_id": model_id}))["model_id"] == model_id
    post(client, "optim_step", {"model_id": model_id, "seq_id": 9}, 410)


def test_chunks_out_of_order_add_up_to_one_batch(client):
    targets, gradients = [1, 2, 3, 4, 5, 6, 7], []
    for chunks in ([targets], [[7], [3, 4], [5, 6], [1, 2]]):
        model_id = new_model(client)
        numbers = [len(chunks), *range(1, len(chunks))] if len(chunks) > 1 else [1]
        sent = [read(client, model_id, number, chunk) for number, chunk in zip(numbers, chunks, strict=True)]
        gradients.append(result(client, step(client, model_id, len(chunks) + 1))["metrics"]["grad_norm"])
        assert sum(loss_of(client, each) for each in sent) == pytest.approx(7 * np.log(256))
    assert gradients[0] == pytest.approx(gradients[1], abs=1e-12)


def test_the_same_request_twice_gets_the_same_id(client):
    model_id = new_model(client)
    first, second = (read(client, model_id, 1, [5]) for _ in range(2))
    assert first == second
    saves = [
        post(client, "save_weights_for_sampler", {"model_id": model_id, "seq_id": 2, "sampling_session_seq_id": number})
        for number in (0, 1)  # a repeat comes with a new number
    ]
    assert saves[0] == saves[1]
    assert result(client, saves[0])["sampling_session_id"].endswith(":sample:0")


def test_what_is_wrong_in_a_training_request_fails_its_future_and_not_the_next(client):
    model_id = new_model(client)
    refused = [
        post(client, "forward_backward", content=batch(model_id, 1, [300]), headers=PROTOBUF),
        post(client, "forward_backward", content=batch(model_id, 2, [1], "stable_reinforce"), headers=PROTOBUF),
        post(client, "optim_step", {"model_id": model_id, "seq_id": 3, "adam_params": {"beta1": 2}}),
        post(client, "optim_step", {"model_id": model_id, "seq_id": 4, "optimizer_params": {"type": "dimuon"}}),
        post(client, "save_weights", {"model_id": model_id, "seq_id": 5, "path": "a/b"}),
        post(client, "save_weights", {"model_id": model_id, "seq_id": 6, "path": ".."}),
        post(client, "save_weights", {"model_id": model_id, "seq_id": 7, "path": "x", "ttl_seconds": 5}),
        post(client, "load_weights", {"model_id": model_id, "seq_id": 8, "path": "tinker://../weights/x"}),
        post(client, "load_weights", {"model_id": model_id, "seq_id": 9, "path": f"tinker://{model_id}/weights/none"}),
        post(client, "forward_backward", {"model_id": model_id, "seq_id": 10, "forward_backward_input": {"data": []}}),
    ]
    for number, each in enumerate(refused, 1):
        answer = result(client, each, protobuf=True)
        assert answer["category"] == "user", number
        assert len(answer["error"].splitlines()) == 1
    assert loss_of(client, read(client, model_id, 11, [5])) > 0


def test_models_that_cannot_be_made_say_why(client):
    session_id = new_session(client)
    for number, change in enumerate(
        [
            *({"base_model": "gpt-5"}, {"lora_config": {"rank": 0}}, {"optimizer_config": {"type": "dimuon"}}),
            {"lora_config": {"train_mlp": False, "train_attn": False, "train_unembed": False}},
        ]
    ):
        form = {"session_id": session_id, "model_seq_id": number, "base_model": "unigram", "lora_config": LORA}
        answer = result(client, post(client, "create_model", form | change))
        assert answer["category"] == "user"
        after = result(client, step(client, f"{session_id}:train:{number}", 1))
        assert "could not be made" in after["error"]
    assert all(session_id not in run["training_run_id"] for run in runs(client))


def runs(client) -> list[dict]:
    return client.get("/api/v1/training_runs", params={"limit": 500}).json()["training_runs"]


BINARY = bytes(range(256)) * 4


FORMS = {
    "create_session": {"tags": ["a"], "user_metadata": {"a": "b"}, "sdk_version": "1", "project_id": "p"},
    "session_heartbeat": {"session_id": "SESSION"},
    "create_model": {"session_id": "SESSION", "model_seq_id": 5, "base_model": "unigram", "lora_config": LORA},
    "get_info": {"model_id": "MODEL"},
    "optim_step": {"model_id": "MODEL", "seq_id": 1, "adam_params": {"learning_rate": 0.1, "eps": 1e-8}},
    "save_weights": {"model_id": "MODEL", "seq_id": 2, "path": "x", "ttl_seconds": 9000, "overwrite": True},
    "save_weights_for_sampler": {"model_id": "MODEL", "seq_id": 3, "sampling_session_seq_id": 8, "kind": "inflight"},
    "load_weights": {"session_id": "SESSION", "model_seq_id": 4, "path": "tinker://m/weights/x", "optimizer": True},
    "create_sampling_session": {"session_id": "SESSION", "sampling_session_seq_id": 1, "base_model": "unigram"},
    "asample": ask("SESSION:sample:1", 1, num_samples=2, topk_prompt_logprobs=1, prompt_logprobs=True),
    "weights_info": {"tinker_path": "tinker://MODEL/weights/x"},
    "retrieve_future": {"request_id": "x", "allow_metadata_only": True},
    "cancel_future": {"request_id": "x"},
    "sessions/search": {
        "limit": 5,
        "statuses": [{"type": "active"}],
        "project_ids": ["p"],
        "user_metadata": {"a": "b"},
    },
    "sessions/SESSION/finish": {"reason": {"type": "success"}, "detail": "x"},
}
ODD = (
    None,
    -1,
    0,
    True,
    1.5,
    1e300,
    2**70,
    "",
    "x" * 600,
    "a/../b",
    "\ud800",
    "\0",
    [],
    [None],
    {},
    {"a": {}},
    [[1], 2],
)


def mutated(chance: random.Random, form: object) -> object:
    """The form with some of its values exchanged, left out or added."""
    if chance.random() < 0.15:
        return chance.choice(ODD)
    if isinstance(form, dict):
        kept = {key: mutated(chance, value) for key, value in form.items() if chance.random() < 0.95}
        return kept | ({"more": chance.choice(ODD)} if chance.random() < 0.1 else {})
    return [mutated(chance, value) for value in form] if isinstance(form, list) else form


def test_no_form_brings_the_server_to_an_error_of_its_own(client):
    chance = random.Random(23)
    for number in range(600):
        if number % 60 == 0:
            model_id = new_model(client)
        route = chance.choice(list(FORMS))
        words = {"SESSION": model_id.split(":")[0], "MODEL": model_id}
        text = json.dumps(mutated(chance, FORMS[route]))
        for word, value in words.items():
            text, route = text.replace(word, value), route.replace(word, value)
        answer = client.post(f"/api/v1/{route}", content=text)
        assert answer.status_code < 500, (route, text)
    assert loss_of(client, read(client, new_model(client), 1, [5])) > 0


@pytest.mark.parametrize(
    ("route", "code", "named"),
    [
        ("forward_backward", 400, {"content": BINARY, "headers": PROTOBUF}),
        ("forward_backward", 400, {"content": BINARY}),
        ("optim_step", 400, {"content": BINARY}),
        ("optim_step", 400, {"content": b"[" * 100_000}),
        ("optim_step", 400, {"content": b"[1]"}),
        ("optim_step", 400, {"content": b'{"model_id": "x", "seq_id": 1e3}'}),
        ("optim_step", 404, {"content": b'{"model_id": "../../x:train:0", "seq_id": 1}'}),
        ("retrieve_future", 404, {"content": b'{"request_id": "x"}'}),
        ("retrieve_future", 400, {"content": b"{}"}),
        ("asample", 404, {"content": json.dumps(ask("x:sample:0"))}),
        ("session_heartbeat", 404, {"content": b'{"session_id": "x"}'}),
        ("forward_backward", 415, {"content": BINARY, "headers": {"Content-Encoding": "zstd", **PROTOBUF}}),
        ("weights_info", 404, {"content": b'{"tinker_path": "tinker://x/weights/y"}'}),
        ("weights_info", 400, {"content": b'{"tinker_path": "tinker://x/y"}'}),
        ("copy_weights", 400, {"content": b'{"source_path": "tinker://x/weights/y"}'}),
        ("create_session", 400, {"content": b'{"tags": [NaN]}'}),
        ("create_custom_loss", 404, {}),
        ("sessions/search", 400, {"content": b'{"limit": 1000}'}),
    ],
)
def test_requests_that_cannot_be_read_end_in_their_code(client, route, code, named):
    answer = post(client, route, code=code, **named)
    if isinstance(answer, dict):
        assert len(answer["detail"]) < 400


def test_large_bodies_are_refused_whether_announced_or_not(tmp_path):
    with server(tmp_path / "state", body_bytes=10_000) as (_, client):
        post(client, "forward_backward", code=413, content=b"x" * 20_000, headers=PROTOBUF)
        chunks = (b"x" * 1000 for _ in range(20))
        post(client, "forward_backward", code=413, content=chunks, headers=PROTOBUF)
        assert client.get("/api/v1/healthz").json() == {"status": "ok"}


def test_a_wrong_key_is_refused_everywhere_but_at_the_health_check(client):
    for key in ("tml-wrong", ""):
        with httpx.Client(base_url=client.base_url, headers={"X-API-Key": key}) as stranger:
            assert stranger.get("/healthz").status_code == 200
            for route in ("client/config", "create_session", "forward_backward", "retrieve_future", "telemetry"):
                post(stranger, route, code=401)
            assert stranger.get("/api/v1/training_runs").status_code == 401


def test_a_tenant_has_so_many_sessions_at_a_time_and_another_its_own(tmp_path):
    with server(tmp_path / "state", sessions_of_a_tenant=2) as (_, client):
        first, _ = new_session(client), new_session(client)
        assert "2 sessions are open" in str(post(client, "create_session", {"type": "create_session"}, 400))
        with httpx.Client(base_url=client.base_url, headers={"X-API-Key": KEYS["b"]}) as other:
            new_session(other)
        assert client.post(f"/api/v1/sessions/{first}/finish", json={}).status_code == 204
        new_session(client)


def test_one_tenant_never_sees_anothers(client):
    model_id = new_model(client)
    session_id = model_id.split(":")[0]
    submitted = read(client, model_id, 1, [5])
    path = save(client, "save_weights", model_id, 2, path="mine")["path"]
    sampler = {"session_id": session_id, "sampling_session_seq_id": 9, "base_model": "unigram"}
    sampler_id = post(client, "create_sampling_session", sampler)["sampling_session_id"]
    with httpx.Client(base_url=client.base_url, headers={"X-API-Key": KEYS["b"]}) as other:
        for route, form in (
            ("retrieve_future", submitted),
            ("session_heartbeat", {"session_id": session_id}),
            ("get_info", {"model_id": model_id}),
            ("optim_step", {"model_id": model_id, "seq_id": 3}),
            ("create_model", {"session_id": session_id, "model_seq_id": 7, "base_model": "unigram"}),
            ("asample", ask(sampler_id)),
            ("weights_info", {"tinker_path": path}),
            ("unload_model", {"model_id": model_id}),
        ):
            post(other, route, form, 404)
        for route in (f"training_runs/{model_id}", f"training_runs/{model_id}/checkpoints", f"samplers/{sampler_id}"):
            assert other.get(f"/api/v1/{route}").status_code == 404
        assert other.delete(f"/api/v1/training_runs/{model_id}/checkpoints/weights/mine").status_code == 404
        assert other.get("/api/v1/checkpoints").json()["checkpoints"] == []
        assert other.get("/api/v1/sessions").json()["sessions"] == []
        mine = new_model(other)
        refused = save(other, "load_weights", mine, 1, path=path)
        assert "not known" in refused["error"]
        client.post(f"/api/v1/training_runs/{model_id}/checkpoints/weights/mine/publish").raise_for_status()
        assert save(other, "load_weights", mine, 2, path=path)["type"] == "load_weights"  # unless it was published


def test_checkpoints_are_listed_published_and_deleted(client):
    model_id = new_model(client, user_metadata={"renderer_name": "role_colon"})
    base = f"/api/v1/training_runs/{model_id}"
    save(client, "save_weights", model_id, 1, path="a")
    save(client, "save_weights_for_sampler", model_id, 2, path="b", ttl_seconds=3600)
    save(client, "save_weights_for_sampler", model_id, 3, sampling_session_seq_id=0)
    again = save(client, "save_weights", model_id, 4, path="a")
    assert (again["category"], "is there already" in again["error"]) == ("user", True)
    assert "path" in save(client, "save_weights", model_id, 5, path="a", overwrite=True)
    listed = client.get(f"{base}/checkpoints").json()["checkpoints"]
    assert [each["checkpoint_id"] for each in listed] == ["weights/a", "sampler_weights/b"]
    assert [each["checkpoint_type"] for each in listed] == ["training", "sampler"]
    assert listed[1]["expires_at"].endswith("+00:00")
    run = client.get(base).json()
    assert run["user_metadata"] == {"renderer_name": "role_colon"}
    assert run["last_checkpoint"]["checkpoint_id"] == "weights/a"
    for _ in range(2):
        assert client.post(f"{base}/checkpoints/weights/a/publish").status_code == 204
    assert client.get(f"{base}/checkpoints").json()["checkpoints"][0]["public"] is True
    assert client.put(f"{base}/checkpoints/weights/a/ttl", json={"ttl_seconds": 1}).status_code == 400
    assert client.put(f"{base}/checkpoints/weights/a/ttl", json={"ttl_seconds": None}).status_code == 204
    assert client.delete(f"{base}/checkpoints/weights/a").status_code == 204
    assert client.delete(f"{base}/checkpoints/weights/a").status_code == 404
    assert client.delete(f"{base}/checkpoints/a").status_code in (404, 405)
    info = post(client, "weights_info", {"tinker_path": f"tinker://{model_id}/sampler_weights/b"})
    assert (info["lora_rank"], info["train_unembed"]) == (8, False)


def test_named_weights_are_sampled_from_and_downloaded(client):
    model_id = new_model(client)
    path = save(client, "save_weights_for_sampler", model_id, 1, path="named")["path"]
    form = {"session_id": model_id.split(":")[0], "sampling_session_seq_id": 0, "model_path": path}
    sampler_id = post(client, "create_sampling_session", form)["sampling_session_id"]
    assert client.get(f"/api/v1/samplers/{sampler_id}").json()["model_path"] == path
    saved = save(client, "save_weights_external", model_id, 2, path="out")
    base = f"/api/v1/training_runs/{model_id}/checkpoints/external_weights/out"
    urls = client.get(f"{base}/external_weights_urls").json()["urls"]
    assert sum(len(httpx.get(url).content) for url in urls.values()) == saved["size_bytes"]
    url = next(iter(urls.values()))
    assert httpx.get(url.replace("/downloads/1", "/downloads/2")).status_code == 404
    moved = client.get(f"{base}/archive")
    assert moved.status_code == 302
    assert len(httpx.get(moved.headers["location"]).content) > saved["size_bytes"]
    other = save(client, "save_weights", model_id, 3, path="state")["path"]
    post(client, "create_sampling_session", form | {"sampling_session_seq_id": 1, "model_path": other}, 400)


def test_frozen_samplers_stay_and_moving_ones_move(client):
    model_id = new_model(client)
    samplers = {}
    for number, kind in enumerate(("snapshot", "inflight"), 1):
        made = save(client, "save_weights_for_sampler", model_id, number, sampling_session_seq_id=number, kind=kind)
        samplers[kind] = made["sampling_session_id"]

    def first(sampler_id: str, seq_id: int) -> float:
        asked = post(client, "asample", ask(sampler_id, seq_id, prompt_logprobs=True))
        return protobuf.read_sample(result(client, asked, protobuf=True)).prompt_logprobs[1]

    before = {kind: first(name, 0) for kind, name in samplers.items()}
    read(client, model_id, 3, [2])
    step(client, model_id, 4)
    save(client, "save_weights_for_sampler", model_id, 5, sampling_session_seq_id=3, kind="inflight")
    assert first(samplers["snapshot"], 1) == before["snapshot"]
    assert first(samplers["inflight"], 1) > before["inflight"]


def test_samples_keep_their_seeds_and_their_stops(client):
    form = {"session_id": new_session(client), "sampling_session_seq_id": 0, "base_model": "unigram"}
    sampler_id = post(client, "create_sampling_session", form)["sampling_session_id"]

    def sampled(seq_id: int, **more):
        answer = result(client, post(client, "asample", ask(sampler_id, seq_id, **more)), protobuf=True)
        return answer if isinstance(answer, dict) else protobuf.read_sample(answer)

    first, again = (sampled(number, num_samples=2).sequences for number in (0, 1))
    assert first[0].tokens.tolist() == again[0].tokens.tolist() != first[1].tokens.tolist()
    stop = int(first[0].tokens[2])
    stopped = sampled(2, params={"stop": [stop]}).sequences[0]
    assert (int(stopped.tokens[-1]), stopped.stop_reason) == (stop, "stop")
    assert sampled(10**18 + 7).sequences[0].tokens.size == 8
    assert "context of unigram is 64" in sampled(3, params={"max_tokens": 100})["error"]
    assert sampled(4, prompt={"chunks": []})["category"] == "user"


def test_sessions_end_and_take_what_is_theirs_along(tmp_path):
    with server(tmp_path / "state", session_s=1.0, sweep_s=0.2) as (_, client):
        silent, finished = new_model(client), new_model(client)
        save(client, "save_weights_for_sampler", silent, 1, sampling_session_seq_id=0)
        session_id = finished.split(":")[0]
        post(client, f"sessions/{session_id}/finish", {"reason": {"type": "success"}}, 204)
        post(client, "session_heartbeat", {"session_id": session_id}, 410)
        post(client, "optim_step", {"model_id": finished, "seq_id": 1}, 410)
        time.sleep(2)
        post(client, "session_heartbeat", {"session_id": silent.split(":")[0]}, 410)
        assert not list((tmp_path / "state" / "tensors").iterdir())
        found = post(client, "sessions/search", {"limit": 1})
        assert len(found["sessions"]) == 1
        rest = post(client, "sessions/search", {"limit": 1, "cursor": found["next_cursor"]})
        assert rest["next_cursor"] is None
        pair = [found["sessions"][0], rest["sessions"][0]]
        assert [each["status"] for each in pair] == [{"type": "client_finished", "reason": {"type": "success"}}, None]
        done = post(client, "sessions/search", {"statuses": [{"type": "client_finished", "reasons": ["success"]}]})
        assert [each["session_id"] for each in done["sessions"]] == [session_id]


def test_polls_are_held_then_told_to_come_again(tmp_path):
    with server(tmp_path / "state", hold_s=0.4, seconds=1.0) as (_, client):
        model_id = new_model(client)
        submitted, began = read(client, model_id, 1, [5]), time.monotonic()
        form = {"request_id": submitted["request_id"]}
        answer = post(client, "retrieve_future", form, headers={"Accept": "application/x-protobuf"})
        assert (answer["type"], answer["queue_state"]) == ("try_again", "active")
        assert 0.35 < time.monotonic() - began < 0.9
        assert loss_of(client, submitted) > 0


def test_a_poll_whose_client_vanished_is_answered_again(tmp_path):
    with server(tmp_path / "state", hold_s=5, seconds=0.5) as (_, client):
        model_id = new_model(client)
        submitted = read(client, model_id, 1, [5])
        with pytest.raises(httpx.ReadTimeout):
            post(client, "retrieve_future", {"request_id": submitted["request_id"]}, timeout=0.1)
        assert loss_of(client, submitted) == loss_of(client, submitted) > 0


def test_figures_count_what_was_done(client):
    loss_of(client, read(client, new_model(client), 1, [5]))
    assert httpx.get(f"{client.base_url}/metrics").status_code == 401
    bearer = {"Authorization": f"Bearer {KEYS['b']}"}
    assert httpx.get(f"{client.base_url}/metrics", headers=bearer).status_code == 200
    text = client.get("/metrics").text
    assert 'rlt_requests_ended_total{kind="forward_backward",outcome="done"}' in text
    assert "rlt_process_memory_bytes" in text
    assert 'rlt_tokens_per_second{kind="forward_backward"}' in text
    assert "rlt_device_memory_used_bytes" in text  # its devices are none here


def test_a_full_queue_of_samples_asks_to_come_again(tmp_path):
    with server(tmp_path / "state", seconds=0.5, samples_waiting=2) as (_, client):
        form = {"session_id": new_session(client), "sampling_session_seq_id": 0, "base_model": "unigram"}
        sampler_id = post(client, "create_sampling_session", form)["sampling_session_id"]
        codes = [client.post("/api/v1/asample", json=ask(sampler_id, number)) for number in range(4)]
        assert [each.status_code for each in codes] == [200, 200, 429, 429]
        assert codes[-1].headers["retry-after"] == "1"


def test_many_clients_at_once_lose_nothing(client):
    """Eight clients, two models each: every request twice, the numbers of a model in any order."""

    def story(number: int) -> list[float]:
        chance = np.random.default_rng(number)
        models = [new_model(client) for _ in range(2)]
        sent = {}
        for seq_id in chance.permutation(np.arange(1, 9)).tolist():
            for model_id in models:
                twice = [read(client, model_id, seq_id, [seq_id]) for _ in range(2)]
                assert twice[0] == twice[1]
                sent[model_id, seq_id] = twice[0]
        norms = [result(client, step(client, model_id, 9))["metrics"]["grad_norm"] for model_id in models]
        assert all(loss_of(client, each) == pytest.approx(np.log(256)) for each in sent.values())
        return norms

    with ThreadPoolExecutor(8) as pool:
        norms = np.array(list(pool.map(story, range(8))))
    assert np.ptp(norms) < 1e-12


@pytest.mark.slow
def test_sixty_four_calls_in_flight_keep_their_order_and_are_executed_once(tmp_path):
    """Eight clients share two adapters; chunks of every batch come in any order, and each twice."""
    log, per_model = tmp_path / "executed", 256
    with server(tmp_path / "state", log=str(log)) as (_, client):
        models = [new_model(client) for _ in range(2)]
        steps = {number for number in range(1, per_model + 1) if number % 8 == 0}  # after seven chunks
        calls = [(model_id, number) for number in range(1, per_model + 1) for model_id in models] * 2
        chance = random.Random(64)
        for start in range(0, len(calls), 64):  # what is in flight at a time comes in any order
            calls[start : start + 64] = chance.sample(calls[start : start + 64], len(calls[start : start + 64]))
        clients = [httpx.Client(base_url=client.base_url, headers=client.headers, timeout=60) for _ in range(8)]

        def call(number: int) -> tuple[str, int, str]:
            model_id, seq_id = calls[number]
            http = clients[number % 8]
            sent = step(http, model_id, seq_id) if seq_id in steps else read(http, model_id, seq_id, [seq_id % 256])
            assert "error" not in (result(http, sent) if seq_id in steps else {})
            return model_id, seq_id, sent["request_id"]

        with ThreadPoolExecutor(64) as pool:
            ids = list(pool.map(call, range(len(calls))))
        assert len({each[2] for each in ids}) == len({each[:2] for each in ids}) == 2 * per_model
        losses = [loss_of(client, {"request_id": each}) for _, seq_id, each in ids if seq_id not in steps]
        assert np.isfinite(losses).all()
        for each in clients:
            each.close()
    executed = [line.split() for line in log.read_text().splitlines()]
    for model_id in models:
        order = [number for name, number in executed if name == model_id]
        assert order == ["step" if number in steps else str(number) for number in range(1, per_model + 1)]


def test_weights_are_copied_into_a_project_or_a_session(client):
    model_id = new_model(client)
    path = save(client, "save_weights_for_sampler", model_id, 1, path="named")["path"]
    copied = post(client, "copy_weights", {"source_path": path, "destination_project_id": "p2", "ttl_seconds": 3600})
    assert copied["tinker_path"].endswith("/sampler_weights/named")
    listed = client.get("/api/v1/training_runs", params={"project_id": "p2"}).json()["training_runs"]
    assert [each["last_sampler_checkpoint"]["tinker_path"] for each in listed] == [copied["tinker_path"]]
    session_id = new_session(client)
    into = {"source_path": path, "session_id": session_id, "model_seq_id": 3}
    again = [post(client, "copy_weights", into)["tinker_path"] for _ in range(2)]
    assert again == [f"tinker://{session_id}:train:3/sampler_weights/named"] * 2
    post(client, "optim_step", {"model_id": f"{session_id}:train:3", "seq_id": 1}, 410)
    assert client.delete(f"/api/v1/training_runs/{model_id}/checkpoints/sampler_weights/named").status_code == 204
    time.sleep(1)  # what nobody refers to is removed by then
    form = {"session_id": session_id, "sampling_session_seq_id": 0, "model_path": again[0]}
    sampler_id = post(client, "create_sampling_session", form)["sampling_session_id"]
    assert "sequences" in result(client, post(client, "asample", ask(sampler_id)))
    for bad in (
        {"source_path": path},
        {**into, "destination_project_id": "p"},
        {"source_path": path, "session_id": "x"},
    ):
        post(client, "copy_weights", bad, 400)


def test_samples_of_a_sampler_are_asked_for_together(tmp_path):
    with server(tmp_path / "state", seconds=0.2, hold_s=5) as (_, client):
        form = {"session_id": new_session(client), "sampling_session_seq_id": 0, "base_model": "unigram"}
        sampler_id = post(client, "create_sampling_session", form)["sampling_session_id"]
        join = {"sampling_session_id": sampler_id, "type": "join_sampling_session"}
        assert [post(client, "join_sampling_session", join)["client_counter"] for _ in range(2)] == [1, 2]
        own = [post(client, "asample", ask(sampler_id, number))["request_id"] for number in range(3)]
        own.append(post(client, "asample", ask(sampler_id, 3, params={"max_tokens": 999}))["request_id"])
        other = post(client, "asample", ask(sampler_id, 10**9))["request_id"]
        seen, cursor = {}, 0
        while len(seen) < 4:
            body = {"target": {"sampling_session_id": sampler_id, "cloned_sampler_id": 0}, "prev_cursor": cursor}
            answer = post(client, "retrieve_futures", body)
            assert answer["completions"]
            assert not seen.keys() & {each["request_id"] for each in answer["completions"]}
            seen |= {each["request_id"]: each for each in answer["completions"]}
            cursor = answer["cursor"]
        assert [seen[each]["state"] for each in own] == ["finished"] * 3 + ["failed"]
        assert seen[own[0]]["response_payload_uncompressed_size"] > 0
        began = time.monotonic()
        assert post(client, "retrieve_futures", body | {"prev_cursor": cursor, "timeout": 0.3})["completions"] == []
        assert 0.25 < time.monotonic() - began < 2
        post(client, "retrieve_futures", body | {"retrieved_request_ids": own, "timeout": 0, "prev_cursor": cursor})
        post(client, "retrieve_future", {"request_id": own[0]}, 410)
        clone = {"target": {"sampling_session_id": sampler_id, "cloned_sampler_id": 1}}
        assert [each["request_id"] for each in post(client, "retrieve_futures", clone)["completions"]] == [other]
        post(client, "retrieve_futures", {"target": {"sampling_session_id": "x"}}, 404)


def test_a_sample_that_was_not_begun_is_cancelled(tmp_path):
    with server(tmp_path / "state", seconds=0.5) as (_, client):
        form = {"session_id": new_session(client), "sampling_session_seq_id": 0, "base_model": "unigram"}
        sampler_id = post(client, "create_sampling_session", form)["sampling_session_id"]
        sent = [post(client, "asample", ask(sampler_id, number)) for number in range(3)]
        post(client, "cancel_future", {"request_id": sent[2]["request_id"]}, 204)
        assert "cancelled" in result(client, sent[2])["error"]
        assert "sequences" in result(client, sent[0])


def test_the_page_shows_a_tenant_its_own_runs(client):
    """Signed in by a form, without a script, and with nothing from elsewhere."""
    model_id = new_model(client, user_metadata={"note": "<script>"})
    for number in range(1, 9, 2):
        read(client, model_id, number, [5])
        result(client, step(client, model_id, number + 1))
    with httpx.Client(base_url=client.base_url, follow_redirects=True) as browser:
        assert browser.get("/").status_code == 401
        assert model_id not in browser.get("/").text
        assert browser.post("/sign-in", data={"key": "tml-wrong-key"}).status_code == 401
        page = browser.post("/sign-in", data={"key": KEYS["a"]})
        cookie = next(iter(browser.cookies.jar))
        assert cookie.has_nonstandard_attr("HttpOnly")
        assert cookie.get_nonstandard_attr("SameSite") == "strict"
        assert KEYS["a"] not in cookie.value
        assert model_id in page.text
        assert "loss per token" in page.text
        assert "<polyline" in page.text
        assert "<script" not in page.text
        assert "http" not in page.text.split("<body>")[-1].replace("http-equiv", "")
        assert "script-src 'none'" in page.headers["content-security-policy"]
        browser.post("/sign-out")
        assert browser.get("/").status_code == 401
        expires, signature, name = cookie.value.split(".")
        for forged in (
            f"{int(expires) + 1}.{signature}.{name}",
            f"{expires}.{signature}.{b'b'.hex()}",
            "a.b.c",
            "x",
            "...",
        ):
            assert httpx.get(client.base_url, headers={"Cookie": f"rlt-page={forged}"}).status_code == 401
    other = httpx.get(client.base_url, headers={"X-API-Key": KEYS["b"]})
    assert other.status_code == 200
    assert model_id not in other.text


def test_many_large_bodies_at_once_are_asked_to_come_again(tmp_path):
    size = 200_000
    with server(tmp_path / "state", bodies_bytes=3 * size) as (process, client):
        key = KEYS["a"]  # without one, nothing of a body is read
        head = (
            f"POST /api/v1/forward_backward HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nContent-Length: {size}\r\n\r\n"
        )
        place = (client.base_url.host, client.base_url.port)
        with contextlib.ExitStack() as open_bodies:
            for _ in range(3):
                open_bodies.enter_context(socket.create_connection(place)).sendall(head.encode())
            time.sleep(0.5)
            refused = client.post("/api/v1/forward_backward", content=b"x" * size, headers=PROTOBUF)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert loss_of(client, read(client, new_model(client), 1, [5])) > 0  # small ones are always read
        time.sleep(0.5)
        post(client, "forward_backward", code=400, content=b"x" * size, headers=PROTOBUF)


def test_a_step_that_failed_is_failed_again_after_a_restart(tmp_path):
    """A step without finite gradients drops them: a model that is brought back has dropped them too."""
    losses = []
    for killed in (False, True):
        folder = tmp_path / str(killed)
        with server(folder, fail_rate=9.0) as (_, client):
            port, model_id = client.base_url.port, new_model(client)
            read(client, model_id, 1, [5])
            assert result(client, step(client, model_id, 2, rate=9.0))["category"] == "user"
            read(client, model_id, 3, [7])
            if not killed:
                step(client, model_id, 4)
                losses.append(loss_of(client, read(client, model_id, 5, [5, 7])))
        if killed:
            with server(folder, port=port, fail_rate=9.0) as (_, client):
                step(client, model_id, 4)
                losses.append(loss_of(client, read(client, model_id, 5, [5, 7])))
    assert losses[0] == losses[1]


def test_a_server_that_is_killed_comes_back_with_what_it_promised(tmp_path):
    folder = tmp_path / "state"
    with server(folder, seconds=0.1, keep_every=4) as (process, client):
        model_id = new_model(client)
        port = client.base_url.port
        sent = [read(client, model_id, n, [n]) if n % 2 else step(client, model_id, n) for n in range(1, 13)]
        time.sleep(0.75)
        os.kill(process.pid, signal.SIGKILL)
    with server(folder, port=port) as (_, client):
        post(client, "session_heartbeat", {"session_id": model_id.split(":")[0]})
        answers = [result(client, each, protobuf=True) for each in sent]
        loss = loss_of(client, read(client, model_id, 13, [1, 3]))
        calm = new_model(client)
        for number in range(1, 13):
            read(client, calm, number, [number]) if number % 2 else step(client, calm, number)
        assert loss == loss_of(client, read(client, calm, 13, [1, 3]))
        assert not any(isinstance(answer, dict) and "error" in answer for answer in answers)
