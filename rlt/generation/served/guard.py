"""The door of a server: a key, asked for at every path but the health check; one run at a time (lease.py); paths that
vLLM's server has not; and a health check that knows a silent engine (silence.py).

vLLM's own key guards generation only, and not the paths that take weights.
"""

import os
import secrets
import signal
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse, Response

from rlt.generation.served.client import END, HELD_CODE, HOLD, HOLDER_HEADER, LET_GO, TRANSFER
from rlt.generation.served.lease import Lease, changes
from rlt.generation.served.silence import SILENCE_S, Silence
from rlt.places import KEY_VARIABLE, TRANSFER_VARIABLE

HEALTH, PAUSE, RESUME = "/health", "/pause", "/resume"
OPEN = (HEALTH,)


class KeyGuard:
    """ASGI middleware for `--middleware rlt.generation.served.guard.KeyGuard`."""

    def __init__(self, app):
        self.app = app
        self.wanted = f"Bearer {os.environ[KEY_VARIABLE]}".encode()
        self.transfer = os.environ.get(TRANSFER_VARIABLE, "")
        self.lease, self.silence = Lease(), Silence()

    async def __call__(self, scope, receive, send):
        if scope["type"] in ("http", "websocket") and scope["path"] not in OPEN:
            headers = Headers(scope=scope)
            if not secrets.compare_digest(headers.get("Authorization", "").encode(), self.wanted):
                await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
                return
            answer = self._answer(scope, unquote(headers.get(HOLDER_HEADER, "")))
            if answer is not None:
                await answer(scope, receive, send)
                return
        elif scope["type"] == "http" and self._is_silent(scope):
            await PlainTextResponse("the engine says nothing", status_code=503)(scope, receive, send)
            return
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return

        async def answer_with(message):
            if message["type"] == "http.response.start":
                self.silence.answered()
                if scope["path"] in (PAUSE, RESUME) and message["status"] < 400:
                    self.silence.paused = scope["path"] == PAUSE
            await send(message)

        with self.silence.asked():
            await self.app(scope, receive, answer_with)

    def _is_silent(self, scope: dict[str, Any]) -> bool:
        engine = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
        return engine is not None and self.silence.of(engine) > SILENCE_S

    def _answer(self, scope: dict[str, Any], holder: str) -> Response | None:
        """To what is asked of the door itself, and to whom the server is not for; None: the server's to answer."""
        if scope["type"] != "http":
            return None
        path = scope["path"]
        if path == LET_GO:
            self.lease.let_go(holder)
            return JSONResponse({})
        if refusal := self.lease.refusal(holder, changes(scope["method"], path)):
            return PlainTextResponse(refusal, status_code=HELD_CODE)
        if path == HOLD:
            return JSONResponse({})
        if path == END:
            os.kill(os.getpid(), signal.SIGKILL)  # its launcher ends the rest, and starts another
        return JSONResponse({"transfer": self.transfer}) if path == TRANSFER else None
