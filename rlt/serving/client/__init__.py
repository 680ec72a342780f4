"""Clients of the training API for scripts and notebooks, without torch.

    service = Client("http://127.0.0.1:8000", key)
    training = service.create_model("unigram", rank=8)
    read, step = training.forward_backward(data, "cross_entropy"), training.optim_step(AdamParams(1e-3))
    print(read.result().metrics["loss:sum"], step.result())         # or: await read

Every operation returns at once with a future, so that several are on their way; `AsyncClient` differs only in that
making models and samplers is awaited too.
"""

from rlt.serving.client.futures import FutureGroup, RequestFailed, ServerFuture
from rlt.serving.client.sampling import SamplingClient
from rlt.serving.client.session import AsyncClient, Client
from rlt.serving.client.training import TrainingClient, datum

__all__ = [
    "AsyncClient",
    "Client",
    "FutureGroup",
    "RequestFailed",
    "SamplingClient",
    "ServerFuture",
    "TrainingClient",
    "datum",
]
