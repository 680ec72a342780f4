"""`/metrics`, in the form that Prometheus reads."""

from collections.abc import Iterator

import psutil
from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from rlt.serving.api.asking import Serving
from rlt.serving.service import Service

router = APIRouter()


class Figures:
    """Reads the service when it is asked."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        requests = self.service.requests
        samples = requests.waiting_samples()
        waiting = GaugeMetricFamily("rlt_requests_waiting", "Requests without an answer", labels=["of"])
        waiting.add_metric(["training"], len(requests.pending) - samples)
        waiting.add_metric(["sampling"], samples)
        yield waiting
        ended = CounterMetricFamily("rlt_requests_ended", "Requests with an answer", labels=["kind", "outcome"])
        for (kind, outcome), count in requests.counts.items():
            ended.add_metric([kind, outcome], count)
        yield ended
        memory = psutil.virtual_memory()
        for name, text, value in (
            ("rlt_open_polls", "Polls that are held", self.service.polls),
            (
                "rlt_process_memory_bytes",
                "Resident memory of the server",
                psutil.Process().memory_info().rss,
            ),
            ("rlt_host_memory_free_bytes", "Memory that the host can give", memory.available),
            ("rlt_host_memory_total_bytes", "Memory of the host", memory.total),
        ):
            yield GaugeMetricFamily(name, text, value=value)


@router.get("/metrics")
def metrics(service: Serving) -> Response:
    registry = CollectorRegistry()
    registry.register(Figures(service))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
