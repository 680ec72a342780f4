"""One model that the server trains."""

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from rlt.serving.client.connection import PROTOBUF
from rlt.serving.client.files import download_files, push_folder
from rlt.serving.client.futures import ServerFuture
from rlt.serving.client.sampling import SamplingClient
from rlt.wire import protobuf
from rlt.wire.values import AdamParams, Datum, ForwardBackwardOutput, ForwardBackwardRequest, LossConfig, tensor_of

if TYPE_CHECKING:
    from rlt.serving.client.session import Session


JSON = "application/json"


class TrainingClient:
    """One model. Requests are numbered when they are made, and executed in that order, however they arrive."""

    def __init__(self, session: "Session", model_id: str) -> None:
        self.session, self.connection, self.model_id = session, session.connection, model_id
        self._last, self._numbering = 0, threading.Lock()

    def request(
        self, route: str, read: Callable[[httpx.Response], Any] = httpx.Response.json, **form: Any
    ) -> ServerFuture[Any]:
        """A numbered request of a route."""
        return self._numbered(route, lambda number: json.dumps(form | self._place(number)).encode(), read)

    def _place(self, number: int) -> dict[str, Any]:
        return {"model_id": self.model_id, "seq_id": number}

    def _numbered(
        self, route: str, write: Callable[[int], bytes], read: Callable[[httpx.Response], Any], kind: str = JSON
    ) -> ServerFuture[Any]:
        """What cannot be written takes no number: later requests would wait for it."""
        with self._numbering:
            body = write(self._last + 1)
            self._last += 1

        async def submit() -> dict[str, Any]:
            return (await self.connection.ask("POST", route, body, **{"content-type": kind})).json()

        return self.connection.request(submit, read)

    def forward_backward(
        self, data: list[Datum], loss_fn: str, loss_config: LossConfig | None = None, forward_only: bool = False
    ) -> ServerFuture[ForwardBackwardOutput]:
        """Gradients add up until `optim_step`."""

        def write(number: int) -> bytes:
            asked = ForwardBackwardRequest(self.model_id, number, data, loss_fn, loss_config or {}, forward_only)
            return protobuf.write_request(asked)

        return self._numbered("forward_backward", write, _read_output, PROTOBUF)

    def forward(self, data: list[Datum], loss_fn: str, **config: Any) -> ServerFuture[ForwardBackwardOutput]:
        """Neither gradients nor weights change."""
        return self.forward_backward(data, loss_fn, config, forward_only=True)

    def optim_step(self, params: AdamParams) -> ServerFuture[dict[str, Any]]:
        return self.request("optim_step", adam_params=asdict(params))

    def train_batch(
        self, data: list[Datum], loss_fn: str, params: AdamParams, loss_config: LossConfig | None = None
    ) -> dict[str, float]:
        """Both requests of a step, sent together; the metrics of both."""
        return _metrics(self.forward_backward(data, loss_fn, loss_config), self.optim_step(params))

    def train_epoch(
        self,
        batches: Iterable[list[Datum]],
        loss_fn: str,
        params: AdamParams,
        loss_config: LossConfig | None = None,
    ) -> list[dict[str, float]]:
        """A step for each batch; the next batch is on its way while one is trained on."""
        sent, metrics = [], []
        for data in batches:
            sent.append((self.forward_backward(data, loss_fn, loss_config), self.optim_step(params)))
            if len(sent) > 1:
                metrics.append(_metrics(*sent.pop(0)))
        return metrics + [_metrics(*pair) for pair in sent]

    def embeddings(self, sequences: Sequence[Sequence[int]]) -> ServerFuture[np.ndarray]:
        """(sequences, hidden size) float32: the mean of each one's last hidden states, with the weights as all requests
        so far leave them. A model that was not trained gives those of its base."""
        lists = [np.asarray(ids, int).tolist() for ids in sequences]
        return self.request("embeddings", _read_embeddings, sequences=lists)

    def save_state(self, name: str, **more: Any) -> ServerFuture[dict[str, Any]]:
        """Weights and optimizer under a `tinker://` path; `more`: ttl_seconds, overwrite."""
        return self.request("save_weights", path=name, **more)

    def load_state(self, path: str, optimizer: bool = True) -> ServerFuture[dict[str, Any]]:
        return self.request("load_weights", path=path, optimizer=optimizer)

    def save_for_sampling(self) -> SamplingClient:
        """A frozen copy of the weights as all requests so far leave them."""
        return self._sampler(self._saved_for_sampling().result())

    async def save_for_sampling_async(self) -> SamplingClient:
        return self._sampler(await self._saved_for_sampling())

    def _saved_for_sampling(self) -> ServerFuture[dict[str, Any]]:
        return self.request("save_weights_for_sampler", sampling_session_seq_id=self.session.next_sampler())

    def _sampler(self, made: dict[str, Any]) -> SamplingClient:
        return SamplingClient(self.connection, made["sampling_session_id"])

    def download(self, folder: str | Path, merged: bool = False) -> Path:
        """Write the adapter as PEFT has it, or with `merged` the whole model with its tokenizer, to a folder here.

        Raises:
            rlt.errors.Refused: the folder has files.
        """
        return download_files(self, Path(folder), merged)

    def push_to_hub(self, repository: str, merged: bool = False, **hub: Any) -> str:
        """Put the adapter, or with `merged` the whole model, on a hub, and say where it is.

        Args:
            repository: owner/name; made where it is missing.
            hub: token, endpoint, private, revision, commit_message; without them the hub's own variables count.

        Raises:
            rlt.errors.Refused: the hub does not take it.
        """
        return push_folder(self, repository, merged, **hub)

    def unload(self) -> ServerFuture[dict[str, Any]]:
        return self.request("unload_model")


def datum(tokens: Sequence[int], **loss_inputs: Any) -> Datum:
    """Tokens that the model reads, and a list for each input of the loss."""
    return Datum(np.asarray(tokens), {name: tensor_of(numbers) for name, numbers in loss_inputs.items()})


def _metrics(read: ServerFuture[ForwardBackwardOutput], step: ServerFuture[dict[str, Any]]) -> dict[str, float]:
    return {**read.result().metrics, **(step.result().get("metrics") or {})}


def _read_output(answer: httpx.Response) -> ForwardBackwardOutput:
    return protobuf.read_output(answer.content)


def _read_embeddings(answer: httpx.Response) -> np.ndarray:
    return np.stack([each["embedding"] for each in protobuf.read_output(answer.content).outputs])
