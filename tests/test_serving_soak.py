"""Hours of small requests in minutes: memory and open files stay what they were after the first thousand."""

from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

pytest.importorskip("sqlalchemy")

from serving_server import post, server  # noqa: E402
from test_serving_api import loss_of, new_model, read, result, step  # noqa: E402

pytestmark = pytest.mark.slow
REQUESTS, FIRST, CLIENTS = 20_000, 1_000, 8
GROWTH = 1.05


def story(client, requests: int) -> None:
    """One session: a model that reads, steps and samples."""
    model_id = new_model(client)
    for number in range(1, requests, 2):
        sent = read(client, model_id, number, [number % 256])
        result(client, step(client, model_id, number + 1))
        assert loss_of(client, sent) > 0
    post(client, f"sessions/{model_id.split(':')[0]}/finish", {"reason": {"type": "success"}}, 204)


def test_twenty_thousand_requests_leave_memory_and_files_as_they_were(tmp_path):
    with server(tmp_path / "state", sweep_s=1) as (process, client), ThreadPoolExecutor(CLIENTS) as pool:
        running = psutil.Process(process.pid)
        figures = []
        for requests in (FIRST, REQUESTS - FIRST):
            list(pool.map(lambda _, share=requests // CLIENTS: story(client, share), range(CLIENTS)))
            figures.append((running.memory_info().rss, running.num_fds()))
    (first_bytes, first_files), (last_bytes, last_files) = figures
    assert last_bytes < GROWTH * first_bytes, f"{first_bytes / 2**20:.0f} to {last_bytes / 2**20:.0f} MiB"
    assert last_files <= first_files
