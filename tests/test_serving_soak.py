"""Hours of small requests in minutes: memory and open files stay what they were after the first of them."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

pytest.importorskip("sqlalchemy")

from serving_kills import KEY, Mortal, unigram_folder  # noqa: E402
from serving_server import post, result  # noqa: E402
from test_serving_api import ask, loss_of, read, step  # noqa: E402

pytestmark = pytest.mark.slow
CLIENTS = 8
OF_A_SESSION = 500  # requests
GROWTH = 1.05

logger = logging.getLogger("rlt")


def session(address: str, base_model: str, requests: int, rate: float) -> None:
    """A model that reads and steps, is saved, and is sampled from."""
    with httpx.Client(base_url=address, headers={"X-API-Key": KEY}, timeout=60) as client:
        session_id = post(client, "create_session", {"tags": []})["session_id"]
        form = {"session_id": session_id, "model_seq_id": 0, "base_model": base_model, "lora_config": {"rank": 4}}
        model_id = result(client, post(client, "create_model", form))["model_id"]
        for number in range(1, requests - 20, 2):
            sent = read(client, model_id, number, [number % 256])
            result(client, step(client, model_id, number + 1, rate))
            assert loss_of(client, sent) > 0
        last = number + 2
        saved = {"model_id": model_id, "seq_id": last, "sampling_session_seq_id": 0}
        sampler = result(client, post(client, "save_weights_for_sampler", saved))["sampling_session_id"]
        for seq_id in range(20):
            result(client, post(client, "asample", ask(sampler, seq_id)), protobuf=True)
        post(client, f"sessions/{session_id}/finish", {"reason": {"type": "success"}}, 204)


def figures(server: Mortal) -> dict[str, int]:
    """Of the server and its workers: resident bytes, open files and sockets, and what lies in temporary folders."""
    own = psutil.Process(server.process.pid)
    family = [own, *(each for each in own.children() if "spawn_main" in " ".join(each.cmdline()))]
    scratch = [path for path in (server.folder / "state" / "scratch").rglob("*") if path.name != "pid"]
    return {
        "bytes": own.memory_info().rss,
        "workers' bytes": sum(each.memory_info().rss for each in family[1:]),
        "files": sum(len(list(Path(f"/proc/{each.pid}/fd").iterdir())) for each in family),
        "scratch": sum(path.is_file() for path in scratch),
        "tensors": len(list((server.folder / "state" / "tensors").iterdir())),
    }


def settled(server: Mortal, tensors: int) -> dict[str, int]:
    """Once what sessions left was removed."""
    end = time.monotonic() + 30
    while (seen := figures(server))["tensors"] > tensors and time.monotonic() < end:
        time.sleep(0.5)
    return seen


def soak(server: Mortal, base_model: str, requests: int, first: int, rate: float) -> list[dict[str, int]]:
    """The figures after the first requests, and after all of them."""
    seen, began = [], time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for some in (first, requests - first):
            share = min(OF_A_SESSION, some // CLIENTS)
            stories = [pool.submit(session, server.address, base_model, share, rate) for _ in range(some // share)]
            for each in stories:
                each.result()
            seen.append(settled(server, tensors=0))
            logger.warning("after %s requests and %.0f s: %s", some, time.monotonic() - began, seen[-1])
    return seen


def check_flat(first: dict[str, int], last: dict[str, int]) -> None:
    assert last["bytes"] < GROWTH * first["bytes"]
    assert last["workers' bytes"] < GROWTH * first["workers' bytes"]
    assert last["files"] <= first["files"]
    assert (last["scratch"], last["tensors"]) == (first["scratch"], 0)


def test_twenty_thousand_requests_leave_memory_and_files_as_they_were(tmp_path):
    base_model = unigram_folder(tmp_path / "unigram")
    with Mortal(tmp_path / "served", base_model, {}, words=["sweep_s=1"]) as server:
        check_flat(*soak(server, base_model, requests=20_000, first=1_000, rate=0.5))


@pytest.mark.timeout(900)
def test_two_thousand_requests_of_a_real_model_leave_its_workers_as_they_were(tmp_path, tiny_teacher):
    """Some thirty adapters are made, trained, sampled from and unloaded one after another, eight at a time."""
    with Mortal(tmp_path / "served", tiny_teacher, words=["sweep_s=1", "sampler=torch"]) as server:
        check_flat(*soak(server, tiny_teacher, requests=2_000, first=500, rate=1e-3))
