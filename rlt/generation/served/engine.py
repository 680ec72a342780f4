"""Generation by vLLM servers: `VLLMEngine`'s surface over HTTP, each rank with its own requests.

Rank 0 keeps the weights that were sent last (weight_service.py), so that a server that was started again gets them
without the trainer. Versions are numbered: a completion counts only when its server had the version that was sent last.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list

from rlt.generation.served.adapters import adapter_tensors, travels_alone
from rlt.generation.served.client import UPDATE_LIMIT_S, Completions, Server, ServerError, own_address
from rlt.generation.served.lease import Hold
from rlt.generation.served.weight_service import WeightService
from rlt.generation.shared_memory import weights_folder
from rlt.generation.vllm_engine import VLLMEngine, groups_of
from rlt.places import WEIGHTS_VARIABLE
from rlt.schema import FILES

REQUESTS_AT_ONCE = 64
T = TypeVar("T")


class ServerEngine(VLLMEngine):
    """`VLLMEngine` on servers that the launcher started, or that are there already, on this machine or others.

    Args:
        urls: of the servers.
        start_limit_s: for a server to be ready, at first and after it died.
        holder: the run's name for others that want its servers; which have one at a time.
        other arguments: as in `VLLMEngine`.
    """

    def __init__(self, *args, urls: list[str], start_limit_s: float, holder: str = "", **kwargs):
        self.servers = [Server(url, holder=holder) for url in urls]
        self.start_limit_s = start_limit_s
        self.lock = threading.Lock()
        self.number = 0
        super().__init__(*args, **kwargs)

    def _init_vllm(self):
        # Overridden: the engines are elsewhere.
        self._wait_for_servers(FILES)
        self.service = self._start_service() if self.accelerator.is_main_process else None
        named = [self.service.url, self.service.folder.name] if self.service else ["", ""]
        url, self.run = broadcast_object_list(named)
        self.weights = Server(url)

    def _wait_for_servers(self, transfer: str) -> None:
        for server in self.servers:
            server.wait_until_ready(self.start_limit_s)
            server.check_transfer(transfer)
        if self.accelerator.is_main_process:
            self.let_go = weakref.finalize(self, Hold(self.servers).close)

    def _start_service(self) -> WeightService:
        several = os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1")
        away = [own_address(server.url) for server in self.servers if not server.is_here]
        address = os.environ["MASTER_ADDR"] if several else away[0] if away else None
        if WEIGHTS_VARIABLE in os.environ:  # removed by the launcher, however this process ends
            folder = os.environ[WEIGHTS_VARIABLE]
        else:
            self.folder = weights_folder()
            folder = self.folder.name
        service = WeightService(self.servers, Path(folder), address, self.start_limit_s)
        self.close = weakref.finalize(self, service.close)
        return service

    def sync_weights(self):
        # Overridden: gathered by all ranks, sent by one, taken by every server.
        self.number += 1
        policy: Any = self.accelerator.unwrap_model(self.model)
        base = policy.get_base_model().name_or_path if travels_alone(policy) else ""
        weights = adapter_tensors(policy, self._dist.gather_params) if base else self._iter_engine_params()
        if self.service is not None:
            self.service.send(weights, torch.float32 if base else self._dtype(), self.version, base)
        else:
            for _ in weights:  # takes part in gathering
                pass
        self.accelerator.wait_for_everyone()

    def _dtype(self) -> torch.dtype:
        """The dtype of forward passes, not of master weights."""
        if self.on_cpu:
            return getattr(torch, self.engine_dtype)
        return torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else self.model.dtype

    @property
    def version(self) -> str:
        """The name of the weights that were sent last; another run's are others, whatever their number."""
        return f"{self.run}-{self.number}"

    def generate_seeded(self, prompts: list[list[int]], seeds: list[int], max_tokens: int | None = None) -> Completions:
        # Overridden: requests go to the server that owes the fewest tokens.
        sampling = self._sampling(max_tokens)
        requests, first = [], 0
        for ids, count in groups_of(prompts, sampling["temperature"]):
            asked = partial(Server.complete, ids=ids, count=count, seed=seeds[first], sampling=sampling)
            requests.append((asked, len(ids) + count * sampling["max_tokens"]))
            first += count
        answers = self._ask_all(requests)
        return [t for tokens, _ in answers for t in tokens], [v for _, values in answers for v in values]

    def next_token_log_probs(self, prompts: list[list[int]], tokens: list[int]) -> list[float]:
        # Overridden: as above.
        asked = partial(Server.next_token_log_prob, temperature=self.temperature)
        pairs = zip(prompts, tokens, strict=True)
        return self._ask_all([(partial(asked, ids=ids, token=token), len(ids)) for ids, token in pairs])

    def _ask_all(self, requests: list[tuple[Callable[[Server], T], int]]) -> list[T]:
        """Answers to requests, each with its cost in tokens, many at once."""
        with ThreadPoolExecutor(min(REQUESTS_AT_ONCE, max(1, len(requests)))) as pool:
            return list(pool.map(lambda request: self._ask(*request), requests))

    def _ask(self, request: Callable[[Server], T], cost: int) -> T:
        """Asked once more, with the weights sent again, when the server fails."""
        with self._server_for(cost) as server:
            try:
                return self._ask_server(server, request)
            except ServerError:
                # Rank 0 brings it up to date, and waits for it where it is being started again.
                limit_s = self.start_limit_s + UPDATE_LIMIT_S
                self.weights.ask("POST", f"/{self.servers.index(server)}", limit_s=limit_s)
                return self._ask_server(server, request)

    @contextmanager
    def _server_for(self, cost: int) -> Iterator[Server]:
        """The server that owes the fewest tokens, which owes `cost` more meanwhile."""
        with self.lock:
            first = self.accelerator.process_index % len(self.servers)  # ranks begin with different ones
            server = min(self.servers[first:] + self.servers[:first], key=lambda each: each.owes)
            server.owes += cost
        try:
            yield server
        finally:
            with self.lock:
                server.owes -= cost

    def _ask_server(self, server: Server, request: Callable[[Server], T]) -> T:
        self._check_version(server)
        answer = request(server)
        self._check_version(server)  # what was written by both is of neither
        return answer

    def _check_version(self, server: Server) -> None:
        version = server.version()
        if version != self.version:
            raise ServerError(f"{server.url} has version {version} of the weights, {self.version} was sent")
