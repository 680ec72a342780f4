"""A session with a server, the models that it trains, and the samplers of their weights."""

import asyncio
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import httpx
import numpy as np

from rlt.serving.client.connection import PROTOBUF, Connection
from rlt.serving.client.futures import ServerFuture
from rlt.wire import protobuf
from rlt.wire.values import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    ForwardBackwardRequest,
    LossConfig,
    SampleResponse,
    SamplingParams,
    tensor_of,
)

HEARTBEAT_S = 10.0


class SamplingClient:
    """Samples of one set of weights."""

    def __init__(self, connection: Connection, sampler_id: str) -> None:
        self.connection, self.sampler_id = connection, sampler_id
        self._numbers = itertools.count()

    def sample(
        self, prompt: Sequence[int], params: SamplingParams | None = None, num_samples: int = 1, **more: Any
    ) -> ServerFuture[SampleResponse]:
        """`more`: prompt_logprobs, topk_prompt_logprobs and other fields of the route `asample`."""
        given = {key: value for key, value in asdict(params or SamplingParams()).items() if value is not None}
        chunks = [{"type": "encoded_text", "tokens": list(prompt)}]
        form = {"sampling_session_id": self.sampler_id, "seq_id": next(self._numbers), "num_samples": num_samples}
        form |= {"prompt": {"chunks": chunks}, "sampling_params": given, **more}
        return self.connection.request(lambda: self.connection.post("asample", form), _read_sample)

    async def stream(self, prompts: Iterable[Sequence[int]], params: SamplingParams | None = None, **more: Any) -> Any:
        """Each prompt's place and samples, as they come."""
        futures = [self.sample(prompt, params, **more) for prompt in prompts]

        async def placed(place: int, future: ServerFuture[SampleResponse]) -> tuple[int, SampleResponse]:
            return place, await future

        for answer in asyncio.as_completed([placed(place, future) for place, future in enumerate(futures)]):
            yield await answer

    def compute_logprobs(self, prompt: Sequence[int]) -> ServerFuture[SampleResponse]:
        """Its `prompt_logprobs` are those of the prompt's tokens; NaN for the first."""
        return self.sample(prompt, SamplingParams(max_tokens=1), prompt_logprobs=True)


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

    def train_batch(self, data: list[Datum], loss_fn: str, params: AdamParams) -> dict[str, float]:
        """Both requests of a step, sent together; the metrics of both."""
        return _metrics(self.forward_backward(data, loss_fn), self.optim_step(params))

    def train_epoch(self, batches: Iterable[list[Datum]], loss_fn: str, params: AdamParams) -> list[dict[str, float]]:
        """A step for each batch; the next batch is on its way while one is trained on."""
        sent, metrics = [], []
        for data in batches:
            sent.append((self.forward_backward(data, loss_fn), self.optim_step(params)))
            if len(sent) > 1:
                metrics.append(_metrics(*sent.pop(0)))
        return metrics + [_metrics(*pair) for pair in sent]

    def save_state(self, name: str, **more: Any) -> ServerFuture[dict[str, Any]]:
        """Weights and optimizer under a `tinker://` path; `more`: ttl_seconds, overwrite."""
        return self._submit("save_weights", path=name, **more)

    def load_state(self, path: str, optimizer: bool = True) -> ServerFuture[dict[str, Any]]:
        return self._submit("load_weights", path=path, optimizer=optimizer)

    def save_for_sampling(self) -> SamplingClient:
        """A frozen copy of the weights as all requests so far leave them."""
        number = self.session.next_sampler()
        made = self._submit("save_weights_for_sampler", sampling_session_seq_id=number).result()
        return SamplingClient(self.connection, made["sampling_session_id"])

    def unload(self) -> ServerFuture[dict[str, Any]]:
        return self._submit("unload_model")


class Session:
    """What both clients do: a session that lives until `close`, with numbers for its models and samplers."""

    def __init__(self, base_url: str, key: str, **named: Any) -> None:
        """`named`: tags, user_metadata, display_name, project_id."""
        self.connection = Connection(base_url, key)
        self._models, self._samplers = itertools.count(), itertools.count()
        opened = self.connection.start(self.connection.post("create_session", named)).result()
        self.session_id = opened["session_id"]
        self._heart = self.connection.start(self._beat())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self.connection.post("session_heartbeat", {"session_id": self.session_id})

    def next_sampler(self) -> int:
        return next(self._samplers)

    def _made(self, route: str, form: dict[str, Any]) -> ServerFuture[TrainingClient]:
        form |= {"session_id": self.session_id, "model_seq_id": next(self._models)}

        def read(answer: httpx.Response) -> TrainingClient:
            return TrainingClient(self, answer.json()["model_id"])

        return self.connection.request(lambda: self.connection.post(route, form), read)

    def _new_model(self, base_model: str, rank: int, **lora: Any) -> ServerFuture[TrainingClient]:
        return self._made("create_model", {"base_model": base_model, "lora_config": {"rank": rank, **lora}})

    def _model_of(self, path: str, optimizer: bool) -> ServerFuture[TrainingClient]:
        return self._made("load_weights", {"path": path, "optimizer": optimizer})

    async def _sampler_of(self, **weights: str) -> SamplingClient:
        form = {"session_id": self.session_id, "sampling_session_seq_id": self.next_sampler(), **weights}
        made = await self.connection.post("create_sampling_session", form)
        return SamplingClient(self.connection, made["sampling_session_id"])

    def close(self) -> None:
        self._heart.cancel()
        body = b'{"reason": {"type": "success"}}'
        self.connection.start(self.connection.ask("POST", f"sessions/{self.session_id}/finish", body)).result()
        self.connection.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client(Session):
    def __enter__(self) -> "Client":
        return self

    def create_model(self, base_model: str, rank: int = 32, **lora: Any) -> TrainingClient:
        """`lora`: seed, train_mlp, train_attn, train_unembed."""
        return self._new_model(base_model, rank, **lora).result()

    def model_from_state(self, path: str, optimizer: bool = True) -> TrainingClient:
        return self._model_of(path, optimizer).result()

    def sampler(self, *, base_model: str | None = None, path: str | None = None) -> SamplingClient:
        return self.connection.start(self._sampler_of(**_weights(base_model, path))).result()


class AsyncClient(Session):
    def __enter__(self) -> "AsyncClient":
        return self

    async def create_model(self, base_model: str, rank: int = 32, **lora: Any) -> TrainingClient:
        return await self._new_model(base_model, rank, **lora)

    async def model_from_state(self, path: str, optimizer: bool = True) -> TrainingClient:
        return await self._model_of(path, optimizer)

    async def sampler(self, *, base_model: str | None = None, path: str | None = None) -> SamplingClient:
        return await asyncio.wrap_future(self.connection.start(self._sampler_of(**_weights(base_model, path))))


def datum(tokens: Sequence[int], **loss_inputs: Any) -> Datum:
    """Tokens that the model reads, and a list for each input of the loss."""
    return Datum(np.asarray(tokens), {name: tensor_of(numbers) for name, numbers in loss_inputs.items()})


def _weights(base_model: str | None, path: str | None) -> dict[str, str]:
    return {"model_path": path} if path is not None else {"base_model": base_model or ""}


def _metrics(read: ServerFuture[ForwardBackwardOutput], step: ServerFuture[dict[str, Any]]) -> dict[str, float]:
    return {**read.result().metrics, **(step.result().get("metrics") or {})}


def _read_output(answer: httpx.Response) -> ForwardBackwardOutput:
    return protobuf.read_output(answer.content)


def _read_sample(answer: httpx.Response) -> SampleResponse:
    return protobuf.read_sample(answer.content)
