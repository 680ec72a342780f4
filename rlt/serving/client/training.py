"""One model that the server trains."""

import itertools
from collections.abc import Iterable, Sequence
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


class TrainingClient:
    """One model. Requests are numbered when they are made, and executed in that order, however they arrive."""

    def __init__(self, session: "Session", model_id: str) -> None:
        self.session, self.connection, self.model_id = session, session.connection, model_id
        self._numbers = itertools.count(1)

    def _submit(self, route: str, **form: Any) -> ServerFuture[Any]:
        form |= {"model_id": self.model_id, "seq_id": next(self._numbers)}
        return self.connection.request(lambda: self.connection.post(route, form), httpx.Response.json)

    def forward_backward(
        self, data: list[Datum], loss_fn: str, loss_config: LossConfig | None = None, forward_only: bool = False
    ) -> ServerFuture[ForwardBackwardOutput]:
        """Gradients add up until `optim_step`."""
        number = next(self._numbers)
        request = ForwardBackwardRequest(self.model_id, number, data, loss_fn, loss_config or {}, forward_only)
        body = protobuf.write_request(request)

        async def submit() -> dict[str, Any]:
            answer = await self.connection.ask("POST", "forward_backward", body, **{"content-type": PROTOBUF})
            return answer.json()

        return self.connection.request(submit, _read_output)

    def forward(self, data: list[Datum], loss_fn: str, **config: Any) -> ServerFuture[ForwardBackwardOutput]:
        """Neither gradients nor weights change."""
        return self.forward_backward(data, loss_fn, config, forward_only=True)

    def optim_step(self, params: AdamParams) -> ServerFuture[dict[str, Any]]:
        return self._submit("optim_step", adam_params=asdict(params))

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
        form = {"model_id": self.model_id, "seq_id": next(self._numbers), "sequences": [list(ids) for ids in sequences]}
        return self.connection.request(lambda: self.connection.post("embeddings", form), _read_embeddings)

    def save_state(self, name: str, **more: Any) -> ServerFuture[dict[str, Any]]:
        """Weights and optimizer under a `tinker://` path; `more`: ttl_seconds, overwrite."""
        return self._submit("save_weights", path=name, **more)

    def load_state(self, path: str, optimizer: bool = True) -> ServerFuture[dict[str, Any]]:
        return self._submit("load_weights", path=path, optimizer=optimizer)

    def save_for_sampling(self) -> SamplingClient:
        """A frozen copy of the weights as all requests so far leave them."""
        return self._sampler(self._saved_for_sampling().result())

    async def save_for_sampling_async(self) -> SamplingClient:
        return self._sampler(await self._saved_for_sampling())

    def _saved_for_sampling(self) -> ServerFuture[dict[str, Any]]:
        return self._submit("save_weights_for_sampler", sampling_session_seq_id=self.session.next_sampler())

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
        return self._submit("unload_model")


def datum(tokens: Sequence[int], **loss_inputs: Any) -> Datum:
    """Tokens that the model reads, and a list for each input of the loss."""
    return Datum(np.asarray(tokens), {name: tensor_of(numbers) for name, numbers in loss_inputs.items()})


def _metrics(read: ServerFuture[ForwardBackwardOutput], step: ServerFuture[dict[str, Any]]) -> dict[str, float]:
    return {**read.result().metrics, **(step.result().get("metrics") or {})}


def _read_output(answer: httpx.Response) -> ForwardBackwardOutput:
    return protobuf.read_output(answer.content)


def _read_embeddings(answer: httpx.Response) -> np.ndarray:
    return np.stack([each["embedding"] for each in protobuf.read_output(answer.content).outputs])
