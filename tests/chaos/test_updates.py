"""Requests thrown at a server without a pause while new weights come 200 times."""

import threading
import time

import pytest
from figures import record
from test_servers import PROMPTS, SEEDS, served, server  # noqa: F401  # fixtures

from rlt.generation.served.client import Server, ServerError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
UPDATES, CLIENTS = 200, 2


def test_no_engine_ends_and_no_completion_is_of_other_weights(served, server):  # noqa: F811
    """An answer that a client counts was asked and given under one version, as the run's own requests are."""
    running, stop = server.processes[0].pid, threading.Event()
    waits, refused, mixed = [], [], []

    def ask_on() -> None:
        client = Server(server.urls[0])
        while not stop.is_set():
            begun = time.monotonic()
            try:
                before = client.version()
                client.complete(PROMPTS[0], 2, 3, {**served._sampling(24), "ignore_eos": True})
                if client.version() != before:
                    mixed.append(before)  # the run's own check would refuse it
            except ServerError as error:
                refused.append(str(error))
            waits.append(time.monotonic() - begun)

    served.sync_weights()
    clients = [threading.Thread(target=ask_on) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        for _ in range(UPDATES):
            served.sync_weights()
    finally:
        stop.set()
        for client in clients:
            client.join(60)
    record(
        f"3. requests that meet new weights, {UPDATES} updates",
        engines_ended=int(server.processes[0].pid != running),
        requests=len(waits),
        asked_again=len(refused) + len(mixed),
        longest_wait_s=f"{max(waits):.1f}",
    )
    assert server.processes[0].pid == running
    assert served.generate_seeded(PROMPTS, SEEDS) == served.generate_seeded(PROMPTS, SEEDS)
    assert max(waits) < 30
