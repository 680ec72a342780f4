"""Samples and log-probs of one set of weights."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import httpx

from rlt.serving.client.connection import Connection
from rlt.serving.client.futures import ServerFuture
from rlt.wire import protobuf
from rlt.wire.values import SampleResponse, SamplingParams


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

    async def stream(
        self, prompts: Iterable[Sequence[int]], params: SamplingParams | None = None, **more: Any
    ) -> AsyncIterator[tuple[int, SampleResponse]]:
        """Each prompt's place and samples, as they come; what has not come when the loop is left is cancelled."""
        futures = [self.sample(prompt, params, **more) for prompt in prompts]

        async def placed(place: int, future: ServerFuture[SampleResponse]) -> tuple[int, SampleResponse]:
            return place, await future

        waiting = [asyncio.ensure_future(placed(place, future)) for place, future in enumerate(futures)]
        try:
            for answer in asyncio.as_completed(waiting):
                yield await answer
        finally:
            for task, future in zip(waiting, futures, strict=True):
                future.cancel()
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def compute_logprobs(self, prompt: Sequence[int]) -> ServerFuture[SampleResponse]:
        """Its `prompt_logprobs` are those of the prompt's tokens; NaN for the first."""
        return self.sample(prompt, SamplingParams(max_tokens=1), prompt_logprobs=True)


def _read_sample(answer: httpx.Response) -> SampleResponse:
    return protobuf.read_sample(answer.content)
