"""`/metrics`, in the form that Prometheus reads: of the whole server, for any tenant's key."""

import asyncio
import time
from collections.abc import Iterator

import psutil
from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from rlt.serving.api.asking import Serving, Tenant
from rlt.serving.service import Service
from rlt.workers.accelerators import Accelerator, accelerators

router = APIRouter()
SAMPLING = ("sample",)


class Figures:
    """Reads the service when it is asked."""

    def __init__(self, service: Service, devices: list[Accelerator]) -> None:
        self.service, self.devices = service, devices

    def collect(self) -> Iterator[Metric]:
        yield from self._queues()
        yield from self._work()
        yield from self._host()
        yield from self._devices()

    def _queues(self) -> Iterator[Metric]:
        requests = self.service.requests
        samples = requests.waiting_samples()
        waiting = GaugeMetricFamily("rlt_requests_waiting", "Requests without an answer", labels=["of"])
        waiting.add_metric(["training"], len(requests.pending) - samples)
        waiting.add_metric(["sampling"], samples)
        yield waiting
        yield _gauge("rlt_requests_waiting_bytes", "What waits", sum(each.size for each in requests.pending.values()))
        yield _gauge("rlt_open_polls", "Polls that are held", self.service.polls)
        yield _counter("rlt_workers_lost", "Workers that another took the place of", requests.lives)

    def _work(self) -> Iterator[Metric]:
        requests = self.service.requests
        ended = CounterMetricFamily("rlt_requests_ended", "Requests with an answer", labels=["kind", "outcome"])
        for (kind, outcome), count in requests.counts.items():
            ended.add_metric([kind, outcome], count)
        yield ended
        yield _by_kind("rlt_tokens", "Tokens that were read or made", requests.tokens)
        yield _by_kind("rlt_busy_seconds", "Seconds that requests took at the worker", requests.busy_s)
        rates = self.service.rates.now(time.monotonic(), requests.tokens, requests.busy_s)
        speed = GaugeMetricFamily("rlt_tokens_per_second", "Over the last minute", labels=["kind"])
        for kind, rate in rates.tokens.items():
            speed.add_metric([kind], rate)
        yield speed
        busy = GaugeMetricFamily("rlt_worker_utilisation", "Share of the last minute, at most 1", labels=["of"])
        sampling = sum(rate for kind, rate in rates.busy.items() if kind in SAMPLING)
        busy.add_metric(["sampling"], min(1.0, sampling))
        busy.add_metric(["training"], min(1.0, sum(rates.busy.values()) - sampling))
        yield busy

    def _host(self) -> Iterator[Metric]:
        memory, own = psutil.virtual_memory(), psutil.Process()
        yield _gauge("rlt_process_memory_bytes", "Resident memory of the server", own.memory_info().rss)
        workers = sum(_memory_of(child) for child in own.children())
        yield _gauge("rlt_workers_memory_bytes", "Resident memory of the workers", workers)
        yield _gauge("rlt_host_memory_free_bytes", "Memory that the host can give", memory.available)
        yield _gauge("rlt_host_memory_total_bytes", "Memory of the host", memory.total)
        yield _gauge("rlt_host_cpu_utilisation", "Share of its processors that is busy", psutil.cpu_percent() / 100)

    def _devices(self) -> Iterator[Metric]:
        named = ["device", "name"]
        used = GaugeMetricFamily("rlt_device_memory_used_bytes", "Memory of a GPU that is taken", labels=named)
        total = GaugeMetricFamily("rlt_device_memory_total_bytes", "Memory of a GPU", labels=named)
        busy = GaugeMetricFamily("rlt_device_utilisation", "Share of time in which a GPU computes", labels=named)
        for each in self.devices:
            labels = [each.index, each.name]
            used.add_metric(labels, each.used_bytes)
            total.add_metric(labels, each.total_bytes)
            busy.add_metric(labels, each.busy)
        yield from (used, total, busy)


def _memory_of(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _by_kind(name: str, text: str, values: dict[str, int] | dict[str, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=["kind"])
    for kind, value in values.items():
        family.add_metric([kind], value)
    return family


@router.get("/metrics")
async def metrics(service: Serving, tenant: Tenant) -> Response:
    devices = await asyncio.to_thread(accelerators)
    registry = CollectorRegistry()
    registry.register(Figures(service, devices))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
