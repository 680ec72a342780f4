"""The training API over real HTTP: a server in a process of its own, with a worker of numbers; and how tests ask it.

`serving_server.py FOLDER PORT_FILE FLAGS_JSON` serves until it is ended.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn
from serving_process import KEYS, service_in
from serving_unigram import Unigram

from rlt.serving.api.app import create_app
from rlt.serving.requests.order import Patience
from rlt.serving.service import ModelPlace
from rlt.wire.values import Limits

START_S = 60
ROOT = Path(__file__).resolve().parent.parent


def post(client: httpx.Client, route: str, form: object = None, code: int = 200, **named):
    """The answer of a route, whose status is checked."""
    content = json.dumps(form if form is not None else {})
    answer = client.post(f"/api/v1/{route}", **({"content": content} | named))
    assert answer.status_code == code, (route, answer.status_code, answer.text[:300])
    return answer.json() if answer.headers.get("content-type") == "application/json" and answer.content else answer


def result(client: httpx.Client, submitted: dict, protobuf: bool = False):
    headers = {"Accept": "application/x-protobuf, application/json"} if protobuf else {}
    for _ in range(20):
        answer = post(client, "retrieve_future", {"request_id": submitted["request_id"]}, headers=headers)
        if not isinstance(answer, dict) or answer.get("type") != "try_again":
            return answer.content if protobuf and not isinstance(answer, dict) else answer
    raise AssertionError("no answer")


@contextmanager
def server(folder: Path, port: int = 0, **flags):
    """Its process and a client with the key of tenant `a`; killed at the end."""
    folder.mkdir(exist_ok=True)
    said = folder / "port"
    said.unlink(missing_ok=True)
    command = [sys.executable, __file__, str(folder), str(port), json.dumps(flags)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        end = time.monotonic() + START_S
        while not said.exists():
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.05)
        base = f"http://127.0.0.1:{said.read_text()}"
        with httpx.Client(base_url=base, headers={"X-API-Key": KEYS["a"]}, timeout=60) as client:
            yield process, client
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(START_S)


async def main(folder: Path, port: int, flags: dict) -> None:
    models = {"unigram": ModelPlace(64, str(folder)), "other": ModelPlace(64)}
    changes = {"client_flags": flags.get("client", {}), "base_models": models}
    if "hold_s" in flags:
        changes["patience"] = Patience(hold_s=flags["hold_s"], gap_s=flags.get("gap_s", 60))
    if "body_bytes" in flags:
        changes["limits"] = Limits(body_bytes=flags["body_bytes"])
    for name in (
        "samples_waiting",
        "sessions_of_a_tenant",
        "bodies_bytes",
        "session_s",
        "sweep_s",
        "keep_every",
        "database",
        "tensors",
    ):
        if name in flags:
            changes[name] = flags[name]
    named = {name: flags[name] for name in ("seconds", "log", "fail_rate") if name in flags}
    service = service_in(folder, Unigram(**named), **changes)
    listener = socket.create_server(("127.0.0.1", port))
    await service.start(KEYS)
    aside = folder / "port.tmp"
    aside.write_text(str(listener.getsockname()[1]))
    aside.rename(folder / "port")
    await uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning")).serve(sockets=[listener])


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])))
