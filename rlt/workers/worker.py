"""What executes requests: behind four names, so that it may be a thread, another process, or many.

| kind | payload | result |
|---|---|---|
| create_model | JSON base_model, adapter; of a checkpoint also address, optimizer | JSON {} |
| forward, forward_backward | protobuf ForwardBackwardRequest | protobuf ForwardBackwardOutput |
| optim_step | JSON adam_params | JSON metrics |
| save_weights, save_weights_for_sampler, save_weights_external, save_weights_merged | JSON address | JSON size_bytes |
| embed | JSON sequences | protobuf ForwardBackwardOutput, `embedding` of each |
| load_weights | JSON address, optimizer | JSON {} |
| sample | JSON body of `asample`, with address (null: no adapter) and base_model | protobuf SampleResponse |
| start, unload_model | JSON {} | JSON {} |
| unload_sampler | JSON address | JSON {} |

An adapter is {rank, seed, train_mlp, train_attn, train_unembed}; a rank of null trains all weights. An address is a
folder of the state's place (a path, or `s3://...`) that nothing else is written to. What `save_weights` writes is the
whole state, from which `load_weights` with `optimizer` goes on as if nothing had happened.
"""

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from rlt.wire import json_form, protobuf
from rlt.wire.json_form import SampleRequest
from rlt.wire.values import AdamParams, ForwardBackwardOutput, ForwardBackwardRequest, SampleResponse

SAMPLING = ("sample", "unload_sampler")  # kinds that need not wait for training
UNLOADING = ("unload_model", "unload_sampler")  # need no worker where none was needed so far


class Executor(Protocol):
    """The result is bytes. Its exception is `rlt.errors.Refused` where the request cannot work, `BrokenExecutor` where
    the worker is lost with all its models, else a defect.

    Requests of one model come one after another, each when the one before it has ended.
    """

    def submit(self, kind: str, model_id: str, payload: bytes) -> Future[bytes]: ...

    def revive(self) -> None:
        """Another worker in the place of one that is lost."""
        ...

    def close(self) -> None: ...


class Worker(Protocol):
    """What a model's place must be able to do; `answer` puts it behind bytes.

    An operation that raises leaves its model as it was: nothing half done may stay in gradients or weights. The same
    operations in the same order give the same model, as some are repeated after a restart.
    """

    def create_model(self, model_id: str, base_model: str, adapter: Mapping[str, Any]) -> None: ...

    def forward_backward(self, request: ForwardBackwardRequest) -> ForwardBackwardOutput: ...

    def optim_step(self, model_id: str, params: AdamParams) -> dict[str, float]: ...

    def embed(self, model_id: str, sequences: list[list[int]]) -> ForwardBackwardOutput:
        """The mean of the last hidden states of each sequence, as `embedding`."""
        ...

    def save(self, model_id: str, kind: str, address: str) -> int:
        """Bytes written. `kind` is the request's: the whole state, an adapter to sample from, or files to download."""
        ...

    def load_weights(self, model_id: str, address: str, optimizer: bool) -> None: ...

    def sample(self, request: SampleRequest, base_model: str, address: str | None) -> SampleResponse: ...

    def unload(self, model_id: str) -> None: ...

    def forget(self, address: str) -> None:
        """Nobody samples from these weights any more."""
        ...


def answer(worker: Worker, kind: str, model_id: str, payload: bytes) -> bytes:
    """One request, from bytes to bytes."""
    if kind in ("forward", "forward_backward"):
        return protobuf.write_output(worker.forward_backward(protobuf.read_request(payload)))
    form = json.loads(payload)
    if kind == "embed":
        return protobuf.write_output(worker.embed(model_id, form["sequences"]))
    if kind == "sample":
        request = json_form.read_sample_request(form)
        return protobuf.write_sample(worker.sample(request, form["base_model"], form["address"]))
    return json.dumps(_answer_json(worker, kind, model_id, form)).encode()


def _answer_json(worker: Worker, kind: str, model_id: str, form: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "create_model":
        worker.create_model(model_id, form["base_model"], form["adapter"])
        if form.get("address"):
            _load_or_unload(worker, model_id, form)
    elif kind == "optim_step":
        return {"metrics": worker.optim_step(model_id, json_form.read_adam(form["adam_params"]))}
    elif kind == "load_weights":
        worker.load_weights(model_id, form["address"], form["optimizer"])
    elif kind == "start":  # a worker that answers has started
        return {}
    elif kind == "unload_model":
        worker.unload(model_id)
    elif kind == "unload_sampler":
        worker.forget(form["address"])
    else:
        return {"size_bytes": worker.save(model_id, kind, form["address"])}
    return {}


def _load_or_unload(worker: Worker, model_id: str, form: Mapping[str, Any]) -> None:
    """A model that does not get its weights is not there."""
    try:
        worker.load_weights(model_id, form["address"], form["optimizer"])
    except BaseException:
        worker.unload(model_id)
        raise


class ThreadExecutor:
    """A worker of the server's own process: one thread trains, one samples."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._training, self._sampling = ThreadPoolExecutor(1, "train"), ThreadPoolExecutor(1, "sample")

    def submit(self, kind: str, model_id: str, payload: bytes) -> Future[bytes]:
        pool = self._sampling if kind in SAMPLING else self._training
        return pool.submit(answer, self.worker, kind, model_id, payload)

    def revive(self) -> None:
        raise AssertionError("a thread is not lost without its process")

    def close(self) -> None:
        for pool in (self._training, self._sampling):
            pool.shutdown(cancel_futures=True)
