"""A session with a server, the models that it trains, and the samplers of their weights."""

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import httpx
import numpy as np

from rlt.serving.client.connection import Connection
from rlt.serving.client.futures import ServerFuture
from rlt.serving.client.metrics import read_metrics
from rlt.serving.client.sampling import SamplingClient
from rlt.serving.client.training import TrainingClient

HEARTBEAT_S = 10.0


class Session:
    """What both clients do: a session that lives until `close`, with numbers for its models and samplers."""

    def __init__(self, base_url: str, key: str, **named: Any) -> None:
        """`named`: tags, user_metadata, display_name, project_id."""
        self.connection = Connection(base_url, key)
        self._models, self._samplers = itertools.count(), itertools.count()
        try:
            opened = self.connection.start(self.connection.post("create_session", named)).result()
        except BaseException:
            self.connection.close()
            raise
        self.session_id = opened["session_id"]
        self._heart = self.connection.start(self._beat())

    async def _beat(self) -> None:
        """Until the session is over."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            with suppress(ConnectionError):  # the server may come back
                await self.connection.post("session_heartbeat", {"session_id": self.session_id})

    def next_sampler(self) -> int:
        return next(self._samplers)

    def _made(self, route: str, form: dict[str, Any]) -> ServerFuture[TrainingClient]:
        form |= {"session_id": self.session_id, "model_seq_id": next(self._models)}

        def read(answer: httpx.Response) -> TrainingClient:
            return TrainingClient(self, answer.json()["model_id"])

        return self.connection.request(lambda: self.connection.post(route, form), read)

    def _new_model(self, base_model: str, rank: int | None, **lora: Any) -> ServerFuture[TrainingClient]:
        return self._made("create_model", {"base_model": base_model, "lora_config": {"rank": rank, **lora}})

    def _model_of(self, path: str, optimizer: bool) -> ServerFuture[TrainingClient]:
        return self._made("load_weights", {"path": path, "optimizer": optimizer})

    async def _sampler_of(self, **weights: str) -> SamplingClient:
        form = {"session_id": self.session_id, "sampling_session_seq_id": self.next_sampler(), **weights}
        made = await self.connection.post("create_sampling_session", form)
        return SamplingClient(self.connection, made["sampling_session_id"])

    def _asked(self, route: str, key: str, **form: Any) -> ServerFuture[Any]:
        async def work() -> Any:
            return (await self.connection.post(route, form))[key]

        return ServerFuture(self.connection.start(work()), lambda: None)

    def _models_served(self) -> ServerFuture[list[str]]:
        async def work() -> list[str]:
            said = (await self.connection.ask("GET", "get_server_capabilities")).json()
            return [each["model_name"] for each in said["supported_models"]]

        return ServerFuture(self.connection.start(work()), lambda: None)

    def _tokens_of(self, base_model: str, texts: Sequence[str], special: bool) -> ServerFuture[list[list[int]]]:
        form = {"base_model": base_model, "texts": list(texts), "add_special_tokens": special}
        return self._asked("tokenize", "tokens", **form)

    def _texts_of(self, base_model: str, tokens: Sequence[Sequence[int]], special: bool) -> ServerFuture[list[str]]:
        form = {
            "base_model": base_model,
            "tokens": [np.asarray(ids).tolist() for ids in tokens],
            "skip_special_tokens": not special,
        }
        return self._asked("detokenize", "texts", **form)

    def _chat_of(self, base_model: str, messages: Sequence[dict[str, Any]], generation: bool) -> ServerFuture[Any]:
        form = {"base_model": base_model, "messages": list(messages), "add_generation_prompt": generation}
        return self._asked("apply_chat_template", "tokens", **form)

    def _figures(self) -> ServerFuture[dict[str, float]]:
        async def work() -> dict[str, float]:
            return read_metrics((await self.connection.ask("GET", "metrics")).text)

        return ServerFuture(self.connection.start(work()), lambda: None)

    def close(self) -> None:
        """End the session; what is on its way is given up."""
        if self.connection.loop.is_closed():
            return
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

    def create_model(self, base_model: str, rank: int | None = 32, **lora: Any) -> TrainingClient:
        """`lora`: seed, train_mlp, train_attn, train_unembed."""
        return self._new_model(base_model, rank, **lora).result()

    def model_from_state(self, path: str, optimizer: bool = True) -> TrainingClient:
        return self._model_of(path, optimizer).result()

    def sampler(self, *, base_model: str | None = None, path: str | None = None) -> SamplingClient:
        return self.connection.start(self._sampler_of(**_weights(base_model, path))).result()

    def models(self) -> list[str]:
        """Base models that the server knows."""
        return self._models_served().result()

    def tokenize(self, base_model: str, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Tokens of each text, by the server's tokenizer."""
        return self._tokens_of(base_model, texts, add_special_tokens).result()

    def detokenize(self, base_model: str, tokens: Sequence[Sequence[int]], special: bool = False) -> list[str]:
        """The reverse; `special`: with the special tokens' names."""
        return self._texts_of(base_model, tokens, special).result()

    def apply_chat_template(
        self, base_model: str, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Tokens of a conversation: messages of role and content."""
        return self._chat_of(base_model, messages, add_generation_prompt).result()

    def get_metrics(self) -> dict[str, float]:
        """The server's figures by name and labels, such as `rlt_requests_waiting{of="training"}`."""
        return self._figures().result()


class AsyncClient(Session):
    """Opening and closing it waits for the server; `async with` closes it without holding up other coroutines."""

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    async def create_model(self, base_model: str, rank: int | None = 32, **lora: Any) -> TrainingClient:
        return await self._new_model(base_model, rank, **lora)

    async def model_from_state(self, path: str, optimizer: bool = True) -> TrainingClient:
        return await self._model_of(path, optimizer)

    async def sampler(self, *, base_model: str | None = None, path: str | None = None) -> SamplingClient:
        return await asyncio.wrap_future(self.connection.start(self._sampler_of(**_weights(base_model, path))))

    async def models(self) -> list[str]:
        return await self._models_served()

    async def tokenize(
        self, base_model: str, texts: Sequence[str], add_special_tokens: bool = False
    ) -> list[list[int]]:
        return await self._tokens_of(base_model, texts, add_special_tokens)

    async def detokenize(self, base_model: str, tokens: Sequence[Sequence[int]], special: bool = False) -> list[str]:
        return await self._texts_of(base_model, tokens, special)

    async def apply_chat_template(
        self, base_model: str, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        return await self._chat_of(base_model, messages, add_generation_prompt)

    async def get_metrics(self) -> dict[str, float]:
        return await self._figures()


def _weights(base_model: str | None, path: str | None) -> dict[str, str]:
    return {"model_path": path} if path is not None else {"base_model": base_model or ""}
