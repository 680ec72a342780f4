"""One vLLM server as its clients see it: requests with a key and a time limit, and errors that name it."""

import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from rlt.errors import Refused
from rlt.launching.connection import UNIX, open_client
from rlt.places import KEY_VARIABLE

Completions = tuple[list[list[int]], list[list[float]]]  # token ids, and the log-prob of each

MODEL = "policy"  # the name under which servers know it
ANSWER_LIMIT_S = 3600  # one group's completions
CONTROL_LIMIT_S = 60  # what takes no more than a step of the engine
UPDATE_LIMIT_S = 300  # some gigabytes of weights
END_LIMIT_S = 10
PAUSE_S = 1.0
HEALTH = "/health"  # the one path that asks for no key
END, TRANSFER, HOLD, LET_GO = "/end", "/weight_transfer", "/hold", "/let_go"  # paths of ours (guard.py)
HOLDER_HEADER = "RLT-Holder"  # which run asks, percent-encoded
HELD_CODE = 423  # Locked (RFC 4918): another run has the server


class ServerError(RuntimeError):
    """A server that does not answer, or not as it should."""


class ServerGone(ServerError):
    """Nobody is there, or the connection was cut: a server that has died, or one that has just started in its place."""


def own_address(url: str) -> str:
    """The address of this machine on the way to another.

    Raises:
        ServerError: there is no way to it.
    """
    place = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((place.hostname, place.port or 80))  # sends nothing
        except OSError as error:
            raise ServerError(f"{url}: {error}") from error
        return probe.getsockname()[0]


class Server:
    """A server and the tokens that it still owes.

    Args:
        limit_s: for an answer.
        holder: the run that asks, for others that want the server; the same in each of its lives on a machine.
    """

    def __init__(self, url: str, limit_s: float = ANSWER_LIMIT_S, holder: str = ""):
        self.url, self.limit_s, self.owes = url.rstrip("/"), limit_s, 0
        self.headers = {HOLDER_HEADER: quote(f"{holder or 'no run'} on {socket.gethostname()}")}
        if key := os.environ.get(KEY_VARIABLE):  # without one, the server says what is missing
            self.headers["Authorization"] = f"Bearer {key}"

    @property
    def is_here(self) -> bool:
        """Whether it shares this machine's memory."""
        return self.url.startswith(UNIX) or own_address(self.url).startswith("127.")

    def ask(self, method: str, path: str, body: dict | None = None, limit_s: float | None = None) -> dict:
        """What the server answers, as JSON.

        Raises:
            ServerError: no answer in time, or one that says no.
            Refused: another run holds the server.
        """
        answer = self._request(method, path, limit_s or self.limit_s, json=body, headers=self.headers)
        try:
            return answer.json() if answer.content else {}
        except ValueError as error:
            raise ServerError(f"{self.url}{path} answered with something else than JSON") from error

    def _request(self, method: str, path: str, limit_s: float, **content: Any) -> httpx.Response:
        try:
            with open_client(self.url, limit_s) as client:
                answer = client.request(method, path, **content)
        except httpx.HTTPError as error:
            kind = ServerError if isinstance(error, httpx.TimeoutException) else ServerGone
            raise kind(f"{self.url}{path}: {error}") from error
        if answer.status_code == HELD_CODE:
            raise Refused(f"{self.url} {answer.text}")
        if not answer.is_success:
            raise ServerError(f"{self.url}{path} answered {answer.status_code}: {answer.text[:300]}")
        return answer

    def wait_until_ready(self, limit_s: float) -> None:
        give_up = time.monotonic() + limit_s
        while True:
            try:
                self._request("GET", HEALTH, limit_s=10)  # without the key: whoever listens may say that it is well
                return
            except ServerError as error:
                if time.monotonic() > give_up:
                    raise ServerError(f"{self.url} is not ready after {limit_s:.0f} s: {error}") from error
            time.sleep(PAUSE_S)

    def version(self, limit_s: float = CONTROL_LIMIT_S) -> str:
        return self.ask("GET", "/weight_info", limit_s=limit_s)["weight_version"]

    def check_transfer(self, wanted: str) -> None:
        """Weights can be sent only by what the server was started to take them by.

        Raises:
            Refused: it was started with another.
            ServerError: no answer in time, or one that says no.
        """
        found = self.ask("GET", TRANSFER, limit_s=CONTROL_LIMIT_S)["transfer"]
        if found != wanted:
            raise Refused(
                f"{self.url} takes weights by {found}, and this run sends them by {wanted}: start the server and the "
                "run with the same weight_transfer (a run that does not train sends files)"
            )

    def hold(self, limit_s: float = CONTROL_LIMIT_S) -> None:
        """Have the server for this run, or go on having it.

        Raises:
            Refused: another run has it.
            ServerError: no answer in time, or one that says no.
        """
        self.control(HOLD, limit_s=limit_s)

    def let_go(self) -> None:
        self.control(LET_GO, limit_s=END_LIMIT_S)

    def end(self) -> None:
        """End a server that cannot be trusted with another update; its launcher starts another in its place."""
        with suppress(ServerError):  # the end is no answer, and one that has ended gives none
            self.ask("POST", END, limit_s=END_LIMIT_S)

    def take_weights(self, updates: Iterable[dict], version: str) -> None:
        """New weights, and nothing left of the old ones: neither requests (their clients ask again) nor prefixes.

        Raises:
            ServerError: the server has not taken them, and writes nothing until it does.
        """
        self.begin_update()
        for update in updates:
            self.take_update(update)
        self.finish_update(version)

    def begin_update(self) -> None:
        """A request that met weights on their way would end the engine."""
        self.control("/pause?mode=abort")
        self.control("/start_weight_update")

    def take_update(self, update: dict) -> None:
        self.control("/update_weights", {"update_info": update}, UPDATE_LIMIT_S)

    def finish_update(self, version: str) -> None:
        self.control("/finish_weight_update", {"weight_version": version}, UPDATE_LIMIT_S)
        if not self.control("/reset_prefix_cache").get("success"):
            raise ServerError(f"{self.url} still holds prefixes of older weights")
        self.control("/resume")

    def control(self, path: str, body: dict | None = None, limit_s: float = CONTROL_LIMIT_S) -> dict:
        return self.ask("POST", path, body or {}, limit_s)

    def complete(self, ids: list[int], count: int, seed: int, sampling: dict) -> Completions:
        request = {
            "model": MODEL,
            "prompt": ids,
            "n": count,
            "seed": seed,
            "return_token_ids": True,
            **sampling,
        }
        choices = sorted(self._choices(request), key=lambda choice: choice["index"])
        return [c["token_ids"] for c in choices], [c["logprobs"]["token_logprobs"] for c in choices]

    def next_token_log_prob(self, ids: list[int], token: int, temperature: float) -> float:
        """The log-prob of one token right behind a prompt, at a temperature."""
        request = {
            "model": MODEL,
            "prompt": ids,
            "max_tokens": 1,
            "seed": 0,
            "temperature": temperature,
            "logprobs": 0,
            "logprob_token_ids": [token],
            "return_tokens_as_token_ids": True,
        }
        (choice,) = self._choices(request)
        return choice["logprobs"]["top_logprobs"][0][f"token_id:{token}"]

    def _choices(self, request: dict) -> list[dict]:
        """What it completed; a request that new weights cut off is none."""
        choices = self.ask("POST", "/v1/completions", request)["choices"]
        if any(choice["finish_reason"] == "abort" for choice in choices):
            raise ServerError(f"{self.url} was given other weights meanwhile")
        return choices
