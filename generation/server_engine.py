"""Generation by vLLM servers: `VLLMEngine`'s surface over HTTP, each rank with its own requests.

Weights are written once, in files, and read by every server; they stay until the next ones come, so that a server
that was started again gets them without the trainer. Versions are numbered: a completion counts only when its server
had the version that was sent last.
"""

import fcntl
import os
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import requests
import torch
from accelerate.utils import broadcast_object_list

from generation.guard import KEY_VARIABLE
from generation.shared_memory import WEIGHTS_VARIABLE, weights_folder
from generation.vllm_engine import Completions, VLLMEngine
from generation.weight_files import FileUpdate, write_chunks

MODEL = "policy"  # the name under which servers know it
ANSWER_LIMIT_S = 3600  # one group's completions
PAUSE_S = 1.0
REQUESTS_AT_ONCE = 64


class ServerError(RuntimeError):
    """A server that does not answer, or not as it should."""


class Server:
    """One vLLM server and the tokens that it still owes."""

    def __init__(self, url: str, limit_s: float):
        self.url, self.limit_s, self.owes = url.rstrip("/"), limit_s, 0
        self.headers = {"Authorization": f"Bearer {os.environ.get(KEY_VARIABLE, '')}"}

    def ask(self, method: str, path: str, body: dict | None = None, limit_s: float | None = None) -> dict:
        """
        Raises:
            ServerError: no answer in time, or one that says no.
        """
        limit = limit_s or self.limit_s
        try:
            with requests.Session() as session:
                session.trust_env = False  # no proxy between this machine and itself, no other key from ~/.netrc
                answer = session.request(method, self.url + path, json=body, headers=self.headers, timeout=limit)
        except requests.RequestException as error:
            raise ServerError(f"{self.url}{path}: {error}") from error
        if not answer.ok:
            raise ServerError(f"{self.url}{path} answered {answer.status_code}: {answer.text[:300]}")
        return answer.json() if answer.content else {}

    def wait_until_ready(self, limit_s: float) -> None:
        give_up = time.monotonic() + limit_s
        while True:
            try:
                self.ask("GET", "/health", limit_s=10)
                return
            except ServerError as error:
                if time.monotonic() > give_up:
                    raise ServerError(f"{self.url} is not ready after {limit_s:.0f} s: {error}") from error
            time.sleep(PAUSE_S)

    def version(self) -> str:
        return self.ask("GET", "/weight_info")["weight_version"]

    def take_weights(self, updates: list[FileUpdate], version: str) -> None:
        self.ask("POST", "/start_weight_update", {})
        for update in updates:
            self.ask("POST", "/update_weights", {"update_info": asdict(update)})
        self.ask("POST", "/finish_weight_update", {"weight_version": version})
        self.ask("POST", "/reset_prefix_cache", {})

    def complete(self, ids: list[int], count: int, seed: int, sampling: dict) -> Completions:
        request = {
            "model": MODEL,
            "prompt": ids,
            "n": count,
            "seed": seed,
            "return_token_ids": True,
            **sampling,
        }
        choices = sorted(self.ask("POST", "/v1/completions", request)["choices"], key=lambda choice: choice["index"])
        return [c["token_ids"] for c in choices], [c["logprobs"]["token_logprobs"] for c in choices]


class ServerEngine(VLLMEngine):
    """`VLLMEngine` on servers that the launcher started, or that are there already.

    Args:
        urls: of the servers; they share memory, or a disk under TMPDIR, with rank 0.
        start_limit_s: for a server to be ready, at first and after it died.
        other arguments: as in `VLLMEngine`.
    """

    def __init__(self, *args, urls: list[str], start_limit_s: float, **kwargs):
        self.servers = [Server(url, ANSWER_LIMIT_S) for url in urls]
        self.start_limit_s = start_limit_s
        self.lock = threading.Lock()
        self.number = 0
        super().__init__(*args, **kwargs)

    def _init_vllm(self):
        # Overridden: the engines are elsewhere.
        for server in self.servers:
            server.wait_until_ready(self.start_limit_s)
        self.folder = self._find_folder()

    def _find_folder(self) -> Path:
        """The launcher's, or one of this process where servers were there before."""
        if WEIGHTS_VARIABLE in os.environ:
            return Path(os.environ[WEIGHTS_VARIABLE])
        made = weights_folder() if self.accelerator.is_main_process else None
        if made:
            self.close = weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        return Path(broadcast_object_list([str(made)])[0])

    def sync_weights(self):
        # Overridden: gathered by all ranks, written by one, read by every server.
        self.number += 1
        new, old = self._weights_folder(self.number), self._weights_folder(self.number - 1)
        low = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else self.model.dtype
        dtype = getattr(torch, self.engine_dtype) if self.on_cpu else low  # of forward passes, not of master weights
        weights = ((name, w.to("cpu", dtype, copy=True)) for name, w in self._iter_engine_params())
        if self.accelerator.is_main_process:
            new.mkdir()
            updates = list(write_chunks(weights, new))
            torch.save([asdict(update) for update in updates], new / "updates.pt")
            for server in self.servers:
                try:
                    self._bring_up_to_date(server)
                except ServerError:
                    self._recover(server)
            shutil.rmtree(old, ignore_errors=True)
        else:
            for _ in weights:  # takes part in gathering
                pass
        self.accelerator.wait_for_everyone()

    def _recover(self, server: Server) -> None:
        """Wait for a server that failed or was started again, and give it the weights."""
        server.wait_until_ready(self.start_limit_s)
        self._bring_up_to_date(server)

    @property
    def version(self) -> str:
        """Of the weights that were sent last; another run's are others, whatever their number."""
        return f"{self.folder.name}-{self.number}"

    def _weights_folder(self, number: int) -> Path:
        return self.folder / str(number)

    def _bring_up_to_date(self, server: Server) -> None:
        """By one rank at a time."""
        with _locked(self.folder / f"{self.servers.index(server)}.lock"):
            if server.version() != self.version:
                updates = torch.load(self._weights_folder(self.number) / "updates.pt", weights_only=True)
                server.take_weights([FileUpdate(**update) for update in updates], self.version)

    def generate_seeded(self, prompts: list[list[int]], seeds: list[int], max_tokens: int | None = None) -> Completions:
        # Overridden: requests go to the server that owes the fewest tokens.
        sampling = self._sampling(max_tokens)
        requested, first = [], 0
        for ids, equal in groupby(prompts):
            count = len(list(equal))
            requested.append((ids, count, seeds[first], sampling))
            first += count
        with ThreadPoolExecutor(min(REQUESTS_AT_ONCE, max(1, len(requested)))) as pool:
            answers = list(pool.map(lambda request: self._complete(*request), requested))
        return [t for tokens, _ in answers for t in tokens], [v for _, values in answers for v in values]

    def _complete(self, ids: list[int], count: int, seed: int, sampling: dict) -> Completions:
        """Asked once more, with the weights sent again, when the server fails."""
        cost = len(ids) + count * sampling["max_tokens"]
        with self.lock:
            first = self.accelerator.process_index % len(self.servers)  # ranks begin with different ones
            server = min(self.servers[first:] + self.servers[:first], key=lambda each: each.owes)
            server.owes += cost
        try:
            try:
                return self._complete_on(server, ids, count, seed, sampling)
            except ServerError:
                self._recover(server)
                return self._complete_on(server, ids, count, seed, sampling)
        finally:
            with self.lock:
                server.owes -= cost

    def _complete_on(self, server: Server, *request) -> Completions:
        completions = server.complete(*request)
        version = server.version()
        if version != self.version:
            raise ServerError(f"{server.url} has version {version} of the weights, {self.version} was sent")
        return completions


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
